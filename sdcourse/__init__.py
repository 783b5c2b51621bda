"A course in notebooks towards a complete Stable Diffusion."
from importlib.metadata import version

__version__ = version('sdcourse')
