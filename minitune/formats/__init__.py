"""Kinds of rows, templates of chats, and the files that hold rows."""
