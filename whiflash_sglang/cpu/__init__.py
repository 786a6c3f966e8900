"""Out-of-tree CPU platform for SGLang."""
def activate():
    return None
