"Reading patches: the defects of the reference system that concern it, one test each, and PASTIS in its official layout"
import json, multiprocessing, pickle, resource, sys, tracemalloc
from pathlib import Path
import geopandas as gpd, numpy as np, pandas as pd, pytest, torch
from affine import Affine
from scipy.ndimage import convolve
from shapely.geometry import box
from crop2seg.augment import turn, vary
from crop2seg.bands import BANDS
from crop2seg.batches import RareSampler, make_loader, make_loaders, patch_weights
from crop2seg.borders import borders
from crop2seg.clouds import add_clear
from crop2seg.cube import load_cube, native_grid
from crop2seg.dataset import CropDataset, band_stats, collate, read_window
from crop2seg.harmonise import ledger
from crop2seg.legend import Legend, read_legend
from crop2seg.parcels import burn, read_parcels
from crop2seg.pastis import PastisDataset, read_norm, read_pastis_index, to_ours, write_pastis
from crop2seg.patches import decode, file_of, read_index, read_patch, write_dataset
from crop2seg.recipe import Recipe, settle
from crop2seg.runs import begin
from crop2seg.season import Season
from crop2seg.simulate import simulate
from crop2seg.stac import open_source, search
from crop2seg.training import make_learner

torch.set_num_threads(1)
real = Path(__file__).parents[2]/'shared'/'real'
FIVE = (1, 2, 3)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A simulated season as a data set of 16 patches of 16 pixels"
    here, legend = tmp_path_factory.mktemp('season'), read_legend()
    items = search(open_source(simulate(here/'season', size=64, dates=14, parcels=24, seed=5)))
    grid = native_grid(items)
    cube = add_clear(load_cube(items, ledger(items, Season(2019)), grid)).compute()
    labels, ids = burn(read_parcels(here/'season'/'parcels.gpkg', legend), grid, outside=0)
    return write_dataset(cube, labels, ids, here/'patches', legend, 2019, size=16, block=160, folds=5)

def same(a, b): return all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a) and set(a) == set(b)

# ---- defects of the reference system

def test_d3_weights_are_named_by_class_and_drive_the_order(folder):
    data = CropDataset(folder, FIVE)
    assert 'weight' not in data.index
    legend = Legend.from_dict(data.facts['legend'])
    loader = make_loader(data, 4, rare=1., draws=800)
    loader.generator.manual_seed(0)
    drawn = np.bincount([i if isinstance(i, int) else i[0] for i in loader.sampler], minlength=len(data))/800
    weights = patch_weights(data.index, legend, 1.)
    assert np.abs(drawn - weights/weights.sum()).max() < .05 and np.ptp(weights) > .1
    seen = sum(len(b[0]) for b in loader)
    assert seen == 800                                             # the draws are what the network is shown

def test_d3_the_training_loop_takes_the_sampler(folder):
    index, facts = read_index(folder)
    for rare, kind in ((0., torch.utils.data.RandomSampler), (.5, RareSampler)):
        recipe = settle(Recipe(model_args=dict(widths=(8, 8), decoder=(8,), n_head=2, d_model=8), valid_fold=5, rare=rare), index.fold)
        learn = make_learner(recipe, begin(recipe, folder, facts), folder, 'cpu', 'fp32')
        assert type(learn.dls.train.sampler) is kind
    with pytest.raises(ValueError, match='rare is 2'): settle(Recipe(rare=2.), index.fold)

@pytest.mark.parametrize('when', [0, -1, 3, '2019-05-20', '2030-01-01'])
@pytest.mark.parametrize('clock', ['relative', 'doy', 'both'])
def test_d4_mono_date_keeps_its_axis_and_its_clock(folder, when, clock):
    data = CropDataset(folder, FIVE, mono_date=when, clock=clock)
    index, _ = read_index(folder)
    for i in range(len(data)):
        days = pd.to_datetime(index.dates[index.patch_id == data.ids[i]].iloc[0])
        at = when if isinstance(when, int) else int(np.abs((days - pd.Timestamp(when)).days).argmin())
        expected = dict(relative=[(days[at] - pd.Timestamp('2018-09-01')).days], doy=[days[at].day_of_year])
        expected['both'] = [expected['relative'] + expected['doy']]
        assert data[i]['days'].tolist() == expected[clock] and data[i]['x'].shape[:2] == (1, 10)

def test_d5_a_sample_is_the_same_every_time_it_is_asked_for(folder):
    data = CropDataset(folder, FIVE, clock='both', add_ndvi=True)
    assert same(data[2], data[2]) and same(data[2], pickle.loads(pickle.dumps(data))[2])

def test_d6_dropout_never_empties_a_series(folder):
    data = CropDataset(folder, FIVE, temporal_dropout=.95, truncate=.5, to_date='2019-03-01')
    for data.epoch in range(40): assert all(len(data[i]['days']) >= 1 for i in range(3))

def test_d7_ndvi_is_of_red_and_near_infrared(folder):
    for data in (CropDataset(folder, FIVE, add_ndvi=True), PastisDataset(folder, FIVE, add_ndvi=True)):
        sample, x = data[1], decode(read_patch(folder, data.ids[1])['series'])
        red, nir = x[:, BANDS.index('B04')], x[:, BANDS.index('B08')]
        expected = np.nan_to_num(((nir - red)/np.where(nir + red > 0, nir + red, np.nan)).clip(-1, 1))
        assert sample['x'].shape[1] == 11 and np.allclose(sample['x'][:, 10], expected, atol=1e-6)

def test_d8_only_the_square_is_turned_and_what_comes_in_is_void():
    rng, sample = np.random.default_rng(0), dict(x=np.ones((2, 3, 24, 24), 'float32'), labels=np.full((24, 24), 5))
    sample |= dict(clear=np.ones((2, 24, 24), bool), labels=rng.integers(1, 13, (24, 24)))
    symmetries = [turn(sample, q, m)['labels'] for q in range(4) for m in (False, True)]
    for _ in range(100):
        out = vary(sample, 14, rng)
        void = out['labels'] == 14
        assert 0 not in out['labels'] and np.isnan(out['x'][:, :, void]).all() and not out['clear'][:, void].any()
        assert not np.isnan(out['x'][:, :, ~void]).any()
        inner = out['labels'][3:-3, 3:-3]                          # shifted by at most three pixels, never resampled
        assert any((np.roll(s, (r, c), (0, 1))[3:-3, 3:-3] == inner).all() for s in symmetries for r in range(-3, 4) for c in range(-3, 4))

@pytest.mark.parametrize('crop', [5, 8, 16])
def test_d8_a_crop_may_lie_anywhere_in_a_patch_of_any_size(folder, crop):
    data, corners = CropDataset(folder, FIVE, crop=crop, get_affine=True), set()
    for data.epoch in range(60):
        left, top = ~Affine(*data.transforms[0]) * tuple(data[0]['transform'][[2, 5]].tolist())
        corners |= {(round(left), round(top))}
    assert {min(c[0] for c in corners), max(c[0] for c in corners)} == {0, 16 - crop}

def test_d9_padding_is_said_and_nothing_else_is_padded(folder):
    data = CropDataset(folder, FIVE, temporal_dropout=.5, get_affine=True, border='class')
    samples = [data[i] for i in range(5)]
    samples[0]['x'][0] = 0                                         # a real frame of zeros
    batch = collate(samples)
    lengths = [len(s['days']) for s in samples]
    assert len(set(lengths)) > 1 and (~batch['pad']).sum(1).tolist() == lengths and batch['x'].shape[1] == max(lengths)
    assert not batch['pad'][0, 0] and batch['transform'].shape == (5, 6) and batch['border'].shape == (5, 16, 16)
    for s, x in zip(samples, batch['x']): assert torch.equal(x[:len(s['days'])], s['x'])

def test_d10_clouds_stay_out_of_the_statistics_and_reach_the_sample(folder, tmp_path):
    index, _ = read_index(folder)
    clear = [decode(read_patch(folder, i)['series']).transpose(0, 2, 3, 1)[read_patch(folder, i)['clear']] for i in index.patch_id]
    x = np.concatenate(clear).astype(float)
    assert np.allclose(band_stats(folder)['mean'], np.nanmean(x, 0), atol=1e-6)
    assert np.allclose(band_stats(folder)['std'], np.nanstd(x, 0), atol=1e-6)      # pooled, no mean of patches (D11)
    data = CropDataset(folder, FIVE)
    assert (data[0]['clear'].numpy() == read_patch(folder, data.ids[0])['clear']).all() and not data[0]['clear'].all()

def test_d12_dates_and_a_crop_are_read_without_the_rest(tmp_path):
    "Of a series of 1.3 GB, a hole on the disk, two dates of 64 pixels cost a few megabytes"
    shape = (61, 10, 1024, 1024)
    for part, a in dict(series=('int16', shape), clear=('bool', (61, 1024, 1024)), labels=('uint8', (1, 64, 64)), parcels=('int32', (64, 64))).items():
        (path := file_of(tmp_path, part, 7)).parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, 'w+', *a)
    asked = 2*10*64*64*2
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tracemalloc.start()
    sample = read_window(tmp_path, 7, np.array([3, 40]), slice(100, 164), slice(7, 71))
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert sample['x'].shape == (2, 10, 64, 64) and sample['clear'].shape == (2, 64, 64)
    assert peak < 12*asked and resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 20_000

def test_d13_a_sample_needs_no_table(folder):
    data = CropDataset(folder, FIVE, get_affine=True, parcels=True)
    before, data.index = data[3], None                             # everything was looked up when the data set was opened
    assert same(before, data[3])

def test_d14_workers_read_under_spawn(folder):
    data = CropDataset(folder, FIVE, augment=True, temporal_dropout=.3)
    data.epoch = 2
    loader = make_loader(data, 4, workers=1, multiprocessing_context=multiprocessing.get_context('spawn'))
    for a, b in zip(make_loader(data, 4), loader, strict=True): assert all(torch.equal(x, y) for x, y in zip(a, b))

def test_d16_neighbours_of_one_crop_have_a_border():
    parcels = np.kron(np.array([[1, 2], [3, 0]]), np.ones((6, 6), int))
    classes = np.array([0, 4, 4, 6])[parcels]
    def by_kernel(ids):                                            # as the original: one plane a class, a plus of ones
        plus = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
        return sum(convolve((ids == k).astype(int), plus, mode='constant') > 0 for k in np.unique(ids)) > 1
    for ids in (parcels, classes, np.random.default_rng(1).integers(0, 4, (20, 30))): assert (borders(ids) == by_kernel(ids)).all()
    assert not borders(classes)[:5, 5:7].any() and borders(parcels)[:, 5:7].all()

def test_d16_the_border_of_a_sample_is_that_of_the_whole_patch(folder):
    data = CropDataset(folder, FIVE, crop=6, border='parcel', parcels=True, get_affine=True)
    cut = 0
    for data.epoch in range(8):
        for i in range(len(data)):
            s = data[i]
            left, top = (round(v) for v in ~Affine(*data.transforms[i]) * tuple(s['transform'][[2, 5]].tolist()))
            full = borders(read_patch(folder, data.ids[i])['parcels'])[top:top + 6, left:left + 6]
            assert (s['border'].numpy() == full).all()
            cut += (full != borders(s['parcels'].numpy())).any()
    assert cut                                                     # a border just outside the crop still counts

def test_d17_the_transform_goes_with_every_other_option(folder):
    data = CropDataset(folder, FIVE, get_affine=True, border='class', parcels=True, class_mapping={c: 0 for c in read_legend().classes}, clock='both')
    batch = next(iter(make_loader(data, 3, collate_fn=collate)))
    assert batch['transform'].shape == (3, 6) and batch['labels'].unique().tolist() in ([0], [0, 14])
    with pytest.raises(ValueError, match='no transform'): CropDataset(folder, FIVE, get_affine=True, augment=True)

def test_a15_a17_each_patch_has_its_own_zone_and_any_size(folder):
    index, facts = read_index(folder)
    assert facts['patch_size'] == 16 and index.epsg.notna().all() and index.crs.to_epsg() == 4326
    for row in index.itertuples():
        a, (left, top) = Affine(*row.transform), gpd.GeoSeries([row.geometry], crs=4326).to_crs(row.epsg).total_bounds[[0, 3]]
        assert (a.a, a.e) == (10, -10) and np.allclose((a.c, a.f), (left, top), atol=.1)

def test_regions_part_a_patch(folder):
    parts = [CropDataset(folder, FIVE, region=r)[1]['labels'] for r in ('all', 'boundary', 'interior')]
    assert ((parts[1] == 14) | (parts[2] == 14)).all() and torch.equal(torch.where(parts[1] == 14, parts[2], parts[1]), parts[0])

def test_clouds_never_hide_everything(folder):
    plain, data = CropDataset(folder, FIVE), CropDataset(folder, FIVE, clouds=1.)
    for i in range(4): assert data[i]['clear'].any() and data[i]['clear'].sum() < plain[i]['clear'].sum()

def test_a_repeated_patch_is_varied_anew(folder):
    data = CropDataset(folder, FIVE, augment=True, temporal_dropout=.2)
    loader = make_loader(data, 1, rare=1., draws=60)
    loader.generator.manual_seed(0)
    keys = [b[0].numpy().tobytes() for b in loader]
    assert len(set(keys)) > 50

def test_show_results_of_the_learner_of_a_training(folder):
    import matplotlib.pyplot as plt
    index, facts = read_index(folder)
    recipe = settle(Recipe(model_args=dict(widths=(8, 8), decoder=(8,), n_head=2, d_model=8), valid_fold=5), index.fold)
    learn = make_learner(recipe, begin(recipe, folder, facts), folder, 'cpu', 'fp32')
    learn.track.finish = lambda *_: pytest.fail('a picture was taken for an epoch')
    learn.show_results(max_n=2)
    fig = plt.gcf()
    assert len(fig.axes) == 6 and [ax.get_ylabel() for ax in fig.axes[::2]] == ['clearest date', 'labels', 'prediction']
    learn.dls.show_batch(max_n=3); plt.close('all')

# ---- PASTIS

def as_others_read(root, folds):
    "Patches as TorchGeo documents the layout: ids and folds from the metadata, then three files each"
    for f in json.loads((root/'metadata.geojson').read_text())['features']:
        p = f['properties']
        if p['Fold'] not in folds: continue
        image, target = (np.load(root/d/f'{n}_{p["ID_PATCH"]}.npy') for d, n in (('DATA_S2', 'S2'), ('ANNOTATIONS', 'TARGET')))
        yield p, image, target[0], root/'INSTANCE_ANNOTATIONS'/f'INSTANCES_{p["ID_PATCH"]}.npy'

def official(root, patches, rows=2433, size=128, seed=0):
    "A folder with the names, numbers and dtypes of PASTIS: metadata of all patches, arrays of a few"
    rng = np.random.default_rng(seed)
    for d in ('DATA_S2', 'ANNOTATIONS', 'INSTANCE_ANNOTATIONS'): (root/d).mkdir(parents=True)
    features = []
    for k in range(rows):
        days = pd.Timestamp('2018-09-17') + pd.to_timedelta(np.sort(rng.choice(430, rng.integers(38, 62), replace=False)), 'D')
        features.append(dict(type='Feature', id=str(k), geometry=box(k, 0, k + 1280, 1280).__geo_interface__, properties={
            'ID_PATCH': 10000 + k, 'Fold': k % 5 + 1, 'TILE': f't3{k % 4}tfm', 'N_Parcels': 3, 'Parcel_Cover': .5,
            'dates-S2': {str(i): int(d.strftime('%Y%m%d')) for i, d in enumerate(days)}}))
    crs = dict(type='name', properties=dict(name='urn:ogc:def:crs:EPSG::2154'))
    (root/'metadata.geojson').write_text(json.dumps(dict(type='FeatureCollection', crs=crs, features=features)))
    for f in features[:patches]:
        n, T = f['properties']['ID_PATCH'], len(f['properties']['dates-S2'])
        ids = np.kron(rng.permutation(16).reshape(4, 4), np.ones((size//4, size//4), int))
        np.save(root/f'DATA_S2/S2_{n}.npy', rng.integers(-400, 9000, (T, 10, size, size)).astype('int16'))
        np.save(root/f'ANNOTATIONS/TARGET_{n}.npy', np.stack([np.where(ids == 0, 0, 1 + ids % 19), ids, ids]).astype('uint8'))
        np.save(root/f'INSTANCE_ANNOTATIONS/INSTANCES_{n}.npy', ids)
    norm = {f'Fold_{f}': dict(mean=[1000. + f]*10, std=[900. + f]*10) for f in range(1, 6)}
    (root/'NORM_S2_patch.json').write_text(json.dumps(norm))
    return root

def test_the_official_layout_at_its_full_size(tmp_path):
    root = official(tmp_path/'PASTIS', patches=5)
    index, facts = read_pastis_index(root)
    assert len(index) == 2433 and facts['patch_size'] == 128 and index.crs.to_epsg() == 2154 and facts['folds'] == 5
    assert index.fold.value_counts().max() - index.fold.value_counts().min() <= 1
    lengths = index.dates.map(len)
    assert lengths.min() >= 38 and lengths.max() <= 61 and index.dates[0][0].startswith('2018-')
    data = PastisDataset(root, (1, 2, 3), target='instance')
    assert len(data) == 1461 and data.void == 19
    assert np.allclose(data.stats['mean'], [.1002]*10) and np.allclose(data.stats['std'], [.0902]*10)
    sample, (p, image, target, instances) = data[0], next(as_others_read(root, (1,)))
    assert sample['x'].shape == (len(p['dates-S2']), 10, 128, 128) and sample['instance'].shape == (7, 128, 128)
    assert np.allclose(sample['x'], (image/1e4 - .1002)/.0902, atol=1e-4) and (sample['labels'].numpy() == target).all()
    assert (sample['instance'][1].numpy() == np.load(instances)).all()
    first = pd.Timestamp(str(p['dates-S2']['0']))
    assert sample['days'][0] == (first - pd.Timestamp('2018-09-01')).days
    mono = PastisDataset(root, (1,), mono_date='2019-06-01', class_mapping=to_ours())[0]
    assert mono['x'].shape[0] == 1 and mono['labels'].max() <= 14              # the original ignored mono_date here
    with pytest.raises(ValueError, match='no transform'): PastisDataset(root, get_affine=True)

def test_ours_is_opened_by_readers_of_pastis(folder, tmp_path):
    index, _ = read_index(folder)
    copy = write_pastis(folder, tmp_path/'PASTIS')
    for root in (folder, copy):
        rows = list(as_others_read(root, (1, 2)))
        assert len(rows) == index.fold.isin((1, 2)).sum()
        for p, image, target, instances in rows:
            arrays = read_patch(folder, p['ID_PATCH'])
            assert image.dtype == np.int16 and len(image) == len(p['dates-S2']) and (image == arrays['series']).all()
            assert (target == arrays['labels']).all()
            if root == copy: assert ((np.load(instances) > 0) == ((arrays['parcels'] > 0) & (target > 0))).all()
    assert len(list(as_others_read(copy, (1, 2, 3, 4, 5)))) == len(index)
    assert np.load(next(copy.glob('ANNOTATIONS/*'))).shape == (3, 16, 16)

@pytest.mark.skipif(not (real/'pastis_format').is_dir(), reason=f'no real patches at {real}')
def test_nine_real_patches(tmp_path):
    data, about = np.load(real/'pastis_format'/'pastis_unittest.npz'), json.loads((real/'pastis_format'/'info.json').read_text())
    for d in ('DATA_S2', 'ANNOTATIONS', 'INSTANCE_ANNOTATIONS'): (tmp_path/d).mkdir()
    features = []
    for k, a in enumerate(about):
        n, lon, lat = int(a['patch_id']), a['lon'], a['lat']
        for name, kind in (('DATA_S2/S2', 's2'), ('ANNOTATIONS/TARGET', 'semantic'), ('INSTANCE_ANNOTATIONS/INSTANCES', 'instance')):
            np.save(tmp_path/f'{name}_{n}.npy', data[f'{k}_{kind}'])
        features.append(dict(type='Feature', geometry=box(lon, lat, lon + .004, lat + .003).__geo_interface__, properties={
            'ID_PATCH': n, 'Fold': k % 5 + 1, 'TILE': a['tile'], 'dates-S2': {str(i): d for i, d in enumerate(a['dates'])}}))
    (tmp_path/'metadata.geojson').write_text(json.dumps(dict(type='FeatureCollection', features=features)))
    (tmp_path/'NORM_S2_patch.json').write_text(json.dumps({'Fold_1': dict(mean=[1500.]*10, std=[1000.]*10)}))
    read = PastisDataset(tmp_path, target='instance', stats=read_norm(tmp_path, (1,)))
    assert len(read) == 9
    for k, a in enumerate(about):
        sample = read[k]
        assert sample['x'].shape == (3, 10, 32, 32) and sample['days'].tolist()[0] == (pd.Timestamp(str(a['dates'][0])) - pd.Timestamp('2018-09-01')).days
        assert np.allclose(sample['x'], (data[f'{k}_s2'] - 1500.)/1000, atol=1e-3) and sample['clear'].all()   # negatives and zeros survive
        ids, n = np.unique(sample['labels'], return_counts=True)
        assert {str(i): c for i, c in zip(ids.tolist(), n.tolist())} == a['classes']
        own = sample['instance'][1].numpy()
        assert (len(np.unique(own)) == len(np.unique(data[f'{k}_instance']))) and ((own > 0) == (data[f'{k}_instance'] > 0)).all()

# ---- what a review found

def test_each_pass_of_a_loader_draws_anew_unless_epochs_are_counted(folder):
    data = CropDataset(folder, FIVE, crop=8, augment=True)
    loader = make_loader(data, 4, shuffle=False)
    first, second = (torch.cat([b['x'][:, :1] if isinstance(b, dict) else b[0][:, :1] for b in loader]) for _ in range(2))
    assert first.shape == second.shape and not torch.equal(first, second)
    data.epoch = 0
    again = torch.cat([b['x'][:, :1] if isinstance(b, dict) else b[0][:, :1] for b in loader])
    assert torch.equal(first, again)

def test_void_goes_through_a_class_mapping(folder):
    to = {c: int(c == 4) for c in range(14)} | {14: 2}
    data = CropDataset(folder, class_mapping=to)
    assert data.void == 2 and set(np.unique(data[0]['labels'])) <= {0, 1, 2}
    assert CropDataset(folder, class_mapping={c: 0 for c in range(14)}).void == 14

def test_wrong_wishes_are_one_sentence(folder):
    for wish, says in ((dict(crop=64), 'take a smaller one'), (dict(set_type='foo'), 'choose train, val or test'), (dict(clouds=5.), 'from 0 to 1'),
                       (dict(temporal_dropout=2.), 'from 0 to 1'), (dict(from_date='5.6.2019'), 'write a day as'), (dict(mono_date='June'), 'write a day as'),
                       (dict(folds=()), 'no patch in folds')):
        with pytest.raises(ValueError, match=says): CropDataset(folder, **wish)
    assert len(CropDataset(folder, folds=2)) == len(CropDataset(folder, folds=(2,)))
    assert CropDataset(folder, folds=(5,), set_type='test').stats == CropDataset(folder, set_type='train').stats

def test_ours_as_pastis_keeps_year_legend_and_void(folder, tmp_path):
    ours, theirs = CropDataset(folder), PastisDataset(write_pastis(folder, tmp_path/'PASTIS'))
    assert theirs.void == ours.void == 14 and theirs.facts['legend'] == ours.facts['legend']
    for a, b in zip(ours, theirs): assert a['patch_id'] == b['patch_id'] and torch.equal(a['days'], b['days']) and torch.equal(a['labels'], b['labels'])
