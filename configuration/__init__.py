from .configuration_duostream import DuoStreamConfig

__all__ = ["DuoStreamConfig"]
