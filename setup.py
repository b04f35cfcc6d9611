"What pip needs: everything is read from settings.ini; `data/` and the app travel inside the wheel as `crop2seg/data` and `crop2seg/app.ipynb`."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
readme = root/'README.md'

class build_with_data(build_py):
    "Puts `data/`, less what a run leaves there, beside the modules; an editable install reads the checkout instead."
    def run(self):
        if self.editable_mode: return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # else a module deleted since the last build travels along
        super().run()
        skip = shutil.ignore_patterns('cache', 'runs')
        shutil.copytree(root/'data', Path(self.build_lib)/cfg['lib_path']/'data', ignore=skip)
        shutil.copy(root/'nbs'/'app.ipynb', Path(self.build_lib)/cfg['lib_path'])

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0', description=cfg['description'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], keywords=cfg['keywords'],
    packages=find_packages(include=['crop2seg', 'crop2seg.*']), cmdclass={'build_py': build_with_data},
    install_requires=cfg['requirements'].split(), extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'lut', 'planetary', 'clouds', 'onnx')},
    python_requires='>=' + cfg['min_python'], zip_safe=False,
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['crop2seg=crop2seg._modidx:d']},
)
