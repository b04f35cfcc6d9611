"""The docs site on machines with no Quarto: nbdev makes the pages' sources, smalldocs renders them from the same _quarto.yml.
Usage: python tools/docs.py [OUT]   (default _docs)"""
import re, shutil, subprocess, sys
from pathlib import Path
import nbdev.doclinks
from execnb.nbio import read_nb
from nbdev.config import get_config
from nbdev.quarto import _def_file_re, nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

def processed(cfg):
    "The notebooks as nbdev hands them to Quarto, made afresh, for its cache misses changes in imported modules."
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    nbdev_sidebar.__wrapped__(path=cfg.nbs_path, file_re=_def_file_re)
    shutil.rmtree(cfg.config_path/'_proc', ignore_errors=True)
    return proc_nbs(cfg.nbs_path, n_workers=2)

def rename_pages(folder):
    "Quarto names a page by its `output-file`, smalldocs by its notebook: rename the notebooks, and the links to them."
    renamed = {}
    for f in sorted(folder.rglob('*.ipynb')):
        head = ''.join(str(cell.source) for cell in read_nb(f).cells[:1])
        found = re.search(r'^output-file:\s*(\S+)\.html', head, re.M)
        if found and found[1] != f.stem: renamed[f.name] = f.rename(f.with_name(found[1] + '.ipynb')).name
    sidebar = folder/'sidebar.yml'
    sidebar.write_text(re.sub(r'[\w.]+\.ipynb', lambda m: renamed.get(m[0], m[0]), sidebar.read_text()))
    link = re.compile(r'(\]\((?:[\w.]+/)*)([\w.]+\.ipynb)')
    for f in folder.rglob('*.ipynb'):
        f.write_text(link.sub(lambda m: m[1] + renamed.get(m[2], m[2]), f.read_text(encoding='utf-8')), encoding='utf-8')

def main(out=None):
    "Builds the site in `out`."
    cfg = get_config()
    out = Path(out or cfg.doc_path).resolve()
    shutil.rmtree(out, ignore_errors=True)
    pages = processed(cfg)
    rename_pages(pages)
    subprocess.run([Path(sys.executable).with_name('smalldocs'), 'render', str(pages)], check=True)
    shutil.move(pages/'_docs', out)
    print(f"{len(list(out.rglob('*.html')))} pages in {out}")

if __name__ == '__main__': main(*sys.argv[1:])
