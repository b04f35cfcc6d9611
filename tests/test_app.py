"The dashboard in a real browser, offline: Debian's chromium, or the one that CHROMIUM names."
import os, shutil, socket, subprocess, sys, time, urllib.error, urllib.request
from contextlib import contextmanager
from pathlib import Path
import pandas as pd
import pytest

chromium = os.environ.get('CHROMIUM') or shutil.which('chromium')
sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed; pip install playwright')
pytestmark = pytest.mark.skipif(not chromium, reason='there is no chromium; install it or name one in CHROMIUM')
root = Path(__file__).parents[1]
flags = ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']

@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A map of a simulated season by a tiny network."
    import torch
    from crop2seg.observe import make_cube
    from crop2seg.pipeline import make_dataset, map_crops
    from crop2seg.simulate import simulate
    from crop2seg.training import train
    torch.set_num_threads(1)
    here = tmp_path_factory.mktemp('app')
    catalog = simulate(here/'season', dates=14, parcels=12, cloudy=.3)
    cube = make_cube(catalog, here/'cube.zarr')
    data = make_dataset(cube, here/'patches', parcels=here/'season'/'parcels.gpkg', size=16, block=160, folds=2)
    train(data, here/'run', model_args=dict(widths=(8, 8), decoder=(8,), n_head=2, d_model=8), epochs=2, augment=False, log=None)
    return map_crops(catalog, here/'map', here/'run')

@contextmanager
def served(folder):
    "Address of the app, served for a bundle."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    url = f'http://localhost:{port}/app'
    env = os.environ | {'CROP2SEG_BUNDLE': str(folder), 'PYTHONPATH': os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])}
    server = subprocess.Popen([sys.executable, '-m', 'panel', 'serve', 'nbs/app.ipynb', '--port', str(port)], cwd=root, env=env)
    try:
        for _ in range(240):
            assert server.poll() is None, 'the server ended before it answered'
            try: urllib.request.urlopen(url, timeout=60).close(); break
            except urllib.error.URLError: time.sleep(.25)
        yield url
    finally:
        server.terminate()
        server.wait(20)

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=flags)
        yield b
        b.close()

@pytest.fixture(scope='module')
def app(bundle):
    with served(bundle) as url: yield url

@contextmanager
def visit(browser, url, **size):
    "A page of its own; afterwards nothing was asked from elsewhere and nothing failed."
    page, outside, errors = browser.new_page(viewport=dict(width=1280, height=800) | size), [], []
    here = ('http://localhost:', 'ws://localhost:', 'data:', 'blob:')
    page.on('request', lambda r: None if r.url.startswith(here) else outside.append(r.url))
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(url)
    yield page
    assert not outside and not errors
    page.close()

def image(page):
    "The overlay, once it can be seen, and has come to rest."
    layer, old = page.locator('.leaflet-image-layer'), None
    layer.wait_for()
    while (box := layer.bounding_box()) != old: old = box; page.wait_for_timeout(300)
    return layer, box

def click(page, box, x, y): page.mouse.click(box['x'] + x * box['width'], box['y'] + y * box['height'])

def test_map_legend_and_season(browser, app, bundle):
    areas = pd.read_csv(bundle/'areas.csv')
    with visit(browser, app) as page:
        _, box = image(page)
        assert min(box['width'], box['height']) > 300
        for name in areas.name[areas.pixels > 0]: page.get_by_role('cell', name=name, exact=True).wait_for()
        assert not [n for n in areas.name[areas.pixels == 0] if page.get_by_role('cell', name=n, exact=True).count()]
        page.get_by_text('Pixel count, no interval').wait_for()
        page.get_by_text('Source: simulated season, no imagery').wait_for()
        assert not page.locator('.bk-Figure').count()
        click(page, box, .5, .5)
        page.get_by_text('clear dates of').wait_for()
        page.locator('.bk-Figure canvas').first.wait_for()
        page.get_by_text('Values as a table').click()
        page.get_by_role('columnheader', name='NDVI').wait_for()
        click(page, box, -.05, .5)
        page.get_by_text('This place lies outside the map').wait_for()
        page.locator('.bk-Figure').wait_for(state='detached')

def test_layers_and_opacity(browser, app):
    with visit(browser, app) as page:
        layer, _ = image(page)
        crops = layer.get_attribute('src')
        page.get_by_role('button', name='Confidence').click()
        page.get_by_text('Probability that the model gives').wait_for()
        sync_api.expect(layer).not_to_have_attribute('src', crops)
        page.get_by_role('button', name='Clear dates').click()
        page.get_by_text('seen without cloud').wait_for()
        page.get_by_role('button', name='Crops').click()
        sync_api.expect(layer).to_have_attribute('src', crops)
        sync_api.expect(layer).to_have_css('opacity', '0.9')
        page.get_by_role('slider').focus()
        for _ in range(4): page.keyboard.press('ArrowLeft')
        sync_api.expect(layer).to_have_css('opacity', '0.7')

def test_typed_place_on_a_phone(browser, app):
    with visit(browser, app, width=360, height=740) as page:
        _, box = image(page)
        assert box['x'] >= 0 and box['x'] + box['width'] <= 360
        assert page.evaluate('document.documentElement.scrollWidth') <= 360
        page.get_by_label('Latitude, longitude').fill('my field')
        page.keyboard.press('Enter')
        page.get_by_text('is not a latitude and a longitude').wait_for()

def test_visitors_do_not_meet(browser, app):
    with visit(browser, app) as one, visit(browser, app) as two:
        image(one), image(two)
        one.get_by_role('button', name='Confidence').click()
        one.get_by_text('Probability that the model gives').wait_for()
        two.get_by_text('Pixel count, no interval').wait_for()

def test_no_map_yet(browser, tmp_path):
    with served(tmp_path/'none') as url, visit(browser, url) as page:
        page.get_by_text('There is no crop map to show').wait_for()
        page.get_by_text('make map', exact=True).wait_for()
        assert not page.get_by_text('Traceback').count()
