"Clouds over real Flanders: sets, detectors and the test in time; skipped where ../shared/real is not beside the checkout"
from pathlib import Path
import numpy as np, pytest, xarray as xr
from crop2seg.clouds import CLEAR, add_clear, clear_of, detect, drop_outliers, outliers
from crop2seg.places import read_place
from crop2seg.season import Season

real = Path(__file__).parents[2]/'shared'/'real'
needs_real = pytest.mark.skipif(not real.is_dir(), reason=f'no real imagery at {real.parent.name}/{real.name}')

@pytest.fixture(scope='module')
def flanders():
    "The square of 2018, all dates"
    return read_place(real/'flanders_2018', Season(2018), 0, 0)[0]

@needs_real
def test_sets_are_nested(flanders):
    sets = {s: add_clear(flanders, 20, s).clear for s in ('default', 'strict', 'land')}
    assert not (sets['strict'] & ~sets['default']).any() and not (sets['land'] & ~sets['strict']).any()
    assert sets['strict'].sum() < sets['default'].sum()

@needs_real
def test_veiled_dates_of_2018_are_found(flanders):
    "Dates with haze that Sen2Cor let through and the image shows, and sunny dates, which stay"
    cube = add_clear(flanders)
    lost = (cube.clear & ~drop_outliers(cube).clear).sum(('y', 'x'))/cube.clear.sum(('y', 'x')).clip(1)
    veiled = ['2018-06-13', '2018-07-13', '2018-07-18', '2018-09-08']
    sunny = ['2018-05-06', '2018-06-30', '2018-07-03', '2018-07-05', '2018-07-15', '2018-08-02', '2018-09-01', '2018-10-21']
    assert lost.sel(time=veiled).min() > .3
    assert lost.sel(time=[d for d in sunny if cube.clear.sel(time=d).mean() > .5]).max() < .03

@needs_real
def test_chunks_and_threads_change_nothing(flanders):
    whole = drop_outliers(add_clear(flanders, 60)).clear
    for scheduler in ('synchronous', 'threads', 'processes'):
        lazy = drop_outliers(add_clear(flanders.chunk(time=7, band=1, y=33, x=20), 60)).clear
        xr.testing.assert_equal(lazy.compute(scheduler=scheduler, num_workers=2), whole)

@needs_real
def test_detector_fills_in_for_a_lost_classification(flanders):
    cube = add_clear(flanders)
    best = int(cube.clear.mean(('y', 'x')).argmax())
    torn = flanders.assign(scl=flanders.scl.where(flanders.time != flanders.time[best], 0))
    assert not add_clear(torn).clear[best].any()
    assert add_clear(torn, detector='spectrum').clear[best].mean() > .9

@needs_real
def test_network_agrees_with_sen2cor(flanders):
    pytest.importorskip('ukis_csmask', reason='the optional detector is not installed: pip install "crop2seg[clouds]"')
    shares = add_clear(flanders, 0).clear.mean(('y', 'x')).values
    few = flanders.isel(time=np.sort(np.r_[np.argsort(shares)[-3:], np.flatnonzero((flanders.scl == 9).mean(('y', 'x')) > .9)[:3]]))
    seen, clear = detect(few, 'csmask'), add_clear(few, 0).clear
    assert seen.dtype == bool and seen.dims == clear.dims
    one = few.isel(time=[0])
    xr.testing.assert_equal(detect(one.chunk(band=1, y=33, x=64), 'csmask').compute(), seen[:1])
    assert seen.values[clear.values].mean() > .9 and seen.values[(few.scl == 9).values].mean() < .1

def test_a_place_of_one_date_or_pixel():
    one = np.full((1, 10, 1, 1), .2, 'float32')
    assert not outliers(one, np.ones((1, 1, 1), bool), np.array([0])).any()
    assert clear_of(np.full((3, 1, 1), 4), margin=500).all() and 0 not in CLEAR
    assert not outliers(np.zeros((0, 10, 2, 2)), np.zeros((0, 2, 2), bool), np.zeros(0)).any()

def test_a_margin_wider_than_the_place():
    cube = xr.Dataset(dict(scl=(('time', 'y', 'x'), np.where(np.arange(36).reshape(1, 6, 6) == 7, 9, 4)),
                           reflectance=(('time', 'band', 'y', 'x'), np.full((1, 1, 6, 6), .1))),
                      dict(time=[0], band=['B02'], y=np.arange(6)*10., x=np.arange(6)*10.))
    assert not add_clear(cube.chunk(y=3, x=2), 500).clear.values.any()
    xr.testing.assert_equal(add_clear(cube.chunk(y=3, x=2), 15).clear.compute(), add_clear(cube, 15).clear)
