"The package's metadata, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


class BuildLessons(build_py):
    "What is installed has the lessons, and what they read, in sdcourse/lessons; a checkout in nbs and benchmarks"
    def lessons(self):
        if self.editable_mode: return {}
        target = Path(self.build_lib)/'sdcourse'/'lessons'
        found = {p: target/p.name for p in [*(here/'nbs').glob('*.ipynb'), here/'nbs'/'pipeline.png']}
        return found | {p: target/'benchmarks'/p.name for p in (here/'benchmarks').glob('*.json')}

    def run(self):
        super().run()
        for nb, target in self.lessons().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            copy2(nb, target)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + [str(o) for o in self.lessons().values()]


setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license_expression=cfg['license'],
    license_files=['LICENSE', 'NOTICE'],
    keywords=cfg['keywords'].split(),
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': ' '.join(cfg[f'{name}_requirements'] for name in ('dev', 'play', 'export')).split(),
                    'play': cfg['play_requirements'].split(), 'export': cfg['export_requirements'].split()},
    packages=find_packages(include=['sdcourse', 'sdcourse.*']),
    include_package_data=False,  # only what the next line names
    package_data={'sdcourse': ['mnist/*', 'pretrained/**/*']},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['sdcourse = sdcourse._modidx:d']},
    cmdclass={'build_py': BuildLessons},
)
