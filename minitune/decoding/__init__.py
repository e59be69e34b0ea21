"""How the next token is chosen: options, sampling, beam search, prompt lookup."""
