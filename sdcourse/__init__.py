"A complete Stable Diffusion, written, trained and understood in notebooks."
from importlib.metadata import version

__version__ = version('sdcourse')
