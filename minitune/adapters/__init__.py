"""Methods of adapting a frozen model, and PEFT's files of them."""
