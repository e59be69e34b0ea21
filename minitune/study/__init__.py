"""Names and files of the study that minitune grew from."""
