"""``python -m bench``: is attnkern right here, how fast is it, and against what."""
