"""What the four scripts share: a plain folder beside them, nothing to install."""
