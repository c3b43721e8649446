"""HEIC and HEIF images, which Pillow decodes where pillow-heif is installed (the extra `heic`)."""


def register() -> bool:
    """Let Pillow decode HEIC. Returns whether it can."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
