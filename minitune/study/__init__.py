"""The names and files of the study that this project grew from."""
