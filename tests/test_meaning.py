"""What files mean, kind by kind: each test draws its own input and asserts the right value."""

import os

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import SRC, draw_ellipse, model_of
from PIL import Image

import command_line
import config
import dataset
import files
import folds
import images
import Lightning_tester
import masks
import predictor

MODEL = model_of((32, 32, 3))
MASK = np.zeros((20, 30), np.uint8)
MASK[2:9, 3:15] = 1
RED, BLACK, BLUE = (255, 0, 0), (0, 0, 0), (0, 0, 255)


@pytest.fixture
def own(tmp_path):
    """Settings for PNGs in tmp_path/img and msk; returns a function that saves a pair."""
    words = {'TRAIN_PATH': 'img', 'MASK_PATH': 'msk', 'TEST_PATH': 'test', 'OUTPUT': 'out'}
    words = [f'{name}={tmp_path / folder}' for name, folder in words.items()]
    words += ['IMAGE_SUFFIX=.png', 'MASK_SUFFIX=.png', 'GROUP_REGEX=None', 'TRAIN_CSV=None']
    command_line.override([*words, 'TEST_CSV=None', 'N_FOLDS=2', 'CROP_SIZE=32'])

    def save(name, image=None, mask=MASK, mask_name=None, folder='img', **options):
        image = np.dstack([90 * MASK + 30] * 3) if image is None else image
        for array, file, more in (
            (image, f'{folder}/{name}', options if folder == 'img' else {}),
            (mask, f'msk/{mask_name or name}', options.get('mask_options', {})),
        ):
            if array is not None:
                picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
                target = tmp_path / file
                target.parent.mkdir(parents=True, exist_ok=True)
                more = {key: value for key, value in more.items() if key != 'mask_options'}
                picture.save(target if target.suffix else f'{target}.png', **more)

    save.folder = tmp_path
    return save


def turned(orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    return {'exif': exif}


def decide(**words):
    vars(config).update(words)
    folds.main()


def pairs():
    """name -> (image, mask) as the dataset gives them."""
    config.CROP_SIZE = MASK.shape
    data = dataset.CarvanaDataset([0, 1], train=False)
    return {item['img']: (item['image'].numpy(), item['mask'].numpy()) for item in data}


# ------------------------------------------------------------ A. orientation
@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('ending', ['.png', '.tif', '.jpg'])
def test_size_and_pixels_of_masks_and_images_are_those_displayed(tmp_path, orientation, ending):
    picture, file = Image.fromarray(255 * MASK), tmp_path / f'm{ending}'
    quality = {'quality': 100} if ending == '.jpg' else {}
    picture.save(file, **turned(orientation), **quality)
    operation = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)  # as in the standard
    shown = picture if operation is None else picture.transpose(Image.Transpose(operation))
    shown = np.array(shown) > 0
    assert images.header(file).size == shown.shape
    assert np.array_equal(masks.read_mask(file), shown)
    assert np.array_equal(images.read_image(file, 1)[..., 0] > 127, shown)


def test_a_mask_turned_as_its_image_fits_and_one_that_is_not_is_told(own, capsys):
    for number in range(4):
        own(f'{number}', mask=255 * MASK, **turned(6), mask_options=turned(6))
    decide()
    image, mask = dataset.read_pair(*masks.files_of(['0'])[0], (30, 20), 3, *folds.mask_rule())
    assert np.array_equal(image[..., 0] > 60, mask == 1) and mask.any()
    own('0', **turned(6))
    with pytest.raises(config.UserMistake, match=r'0: EXIF turns only one .*6 and 1.*exiftool'):
        folds.main()
    for number in range(4):
        own(f'{number}', **turned(3))
    capsys.readouterr()
    decide()
    assert '4 images and their masks have different EXIF rotations' in capsys.readouterr().out


@pytest.mark.parametrize('orientation', [3, 6])
def test_a_jpeg_turned_by_xmp_alone(tmp_path, orientation):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'  # noqa: E501
    file = tmp_path / 'a.jpg'
    Image.fromarray(255 * MASK).save(file, quality=100, xmp=xmp.encode())
    shown = np.rot90(MASK, 2 if orientation == 3 else -1)
    assert images.header(file).size == shown.shape
    assert np.array_equal(images.read_image(file, 1)[..., 0] > 127, shown)
    assert np.array_equal(masks.read_mask(file), shown)


# ------------------------------------------------------------ B. bits, sign, pages, fractions, alpha
@pytest.mark.parametrize('ending', ['.png', '.tif', '.ppm'])
def test_sixteen_bits_per_colour_are_refused(tmp_path, ending):
    file = str(tmp_path / f'a{ending}')
    cv2.imwrite(file, np.full((4, 5, 3), 1000, np.uint16))
    for read in (images.read_image, lambda f: images.header(f, images.check_bits)):
        with pytest.raises(config.UserMistake, match=rf'a\{ending}: more than 8 bits'):
            read(file)


def test_a_mask_in_the_alpha_channel_may_have_sixteen_bits(tmp_path):
    pixels = np.full((4, 6, 4), 65535, np.uint16)
    pixels[..., 3] = 0
    pixels[1:3, 1:4, 3] = 65535
    cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    assert np.array_equal(masks.read_mask(tmp_path / 'a.png'), pixels[..., 3] > 0)
    pixels[0, 0, :3] = 0  # colours of 16 bits
    pixels[..., 3] = 65535
    cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    with pytest.raises(config.UserMistake, match='a.png: colours of 16 bits'):
        masks.read_mask(tmp_path / 'a.png')


@pytest.mark.parametrize(('bits', 'top'), [(2, 3), (4, 15), (8, 20)])
def test_the_files_own_values_of_few_bits(tmp_path, bits, top):
    values = (np.arange(600) % (top + 1)).reshape(20, 30).astype(np.uint8)
    file = tmp_path / 'm.png'
    Image.fromarray(values * (255 // (2**bits - 1))).save(file, bits=bits)
    if bits == 8:
        Image.fromarray(values).save(file)
    else:  # Pillow writes grey in 8 bits alone; PNG by hand
        write_png(file, values, bits)
    assert np.array_equal(masks.read_mask(file, classes=top + 1), values)


def write_png(file, values, bits):
    import struct
    import zlib

    height, width = values.shape
    rows = b''.join(
        b'\0' + np.packbits((values[y, :, None] >> np.arange(bits)[::-1]) & 1).tobytes()
        for y in range(height)
    )
    text = b'\x89PNG\r\n\x1a\n'
    for kind, data in (
        (b'IHDR', struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)),
        (b'IDAT', zlib.compress(rows)),
        (b'IEND', b''),
    ):
        text += struct.pack('>I', len(data)) + kind + data
        text += struct.pack('>I', zlib.crc32(kind + data))
    file.write_bytes(text)


@pytest.mark.parametrize('dtype', [np.int8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize('ignored', [-1, -100])
def test_negative_labels_are_refused_or_ignored(tmp_path, dtype, ignored):
    labels = MASK.astype(dtype)
    labels[15:] = ignored
    file = tmp_path / 'm.tif'
    if dtype == np.int8:  # Pillow writes no signed bytes: the tag SampleFormat says so
        Image.fromarray(labels.view(np.uint8)).save(file, tiffinfo={339: 2})
    else:
        cv2.imwrite(str(file), labels)
    with pytest.raises(config.UserMistake, match=f'mask values {ignored}, 0, 1'):
        masks.read_mask(file)
    mask = masks.read_mask(file, ignore_index=ignored)
    assert (mask[15:] == 255).all() and np.array_equal(mask[:15], MASK[:15])
    assert masks.ignored_value(ignored) == 255


def test_an_ignored_value_above_8_bits_and_whole_numbers_as_floats(tmp_path):
    labels = MASK.astype(np.uint16) * 2
    labels[15:] = 65535
    Image.fromarray(labels).save(tmp_path / 'm.png')
    mask = masks.read_mask(tmp_path / 'm.png', 3, 65535)
    assert (mask[15:] == 255).all() and np.array_equal(mask[:15], 2 * MASK[:15])
    Image.fromarray(MASK.astype(np.float32) * 255).save(tmp_path / 'm.tif')
    assert np.array_equal(masks.read_mask(tmp_path / 'm.tif'), MASK)


def test_values_of_a_16_bit_pgm_and_white_of_two_bits(tmp_path):
    cv2.imwrite(str(tmp_path / 'm.pgm'), MASK.astype(np.uint16))
    write_png(tmp_path / 'm.png', 3 * MASK, 2)
    for name in ('m.pgm', 'm.png'):
        assert np.array_equal(masks.read_mask(tmp_path / name), MASK)


def test_pages_are_refused(tmp_path):
    page = Image.fromarray(MASK)
    page.save(tmp_path / 'm.tif', save_all=True, append_images=[page, page])
    for read in (masks.read_mask, images.read_image, images.header):
        with pytest.raises(config.UserMistake, match=r'm\.tif: a TIFF of 3 pages'):
            read(tmp_path / 'm.tif')
    other = Image.fromarray(1 - MASK)
    page.save(tmp_path / 'm.gif', save_all=True, append_images=[other])
    with pytest.raises(config.UserMistake, match=r'm\.gif: it is animated'):
        images.header(tmp_path / 'm.gif')


@pytest.mark.parametrize('colour', [0, 255])
@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_a_mask_that_stands_in_the_alpha_channel(tmp_path, colour, mode):
    picture = Image.new(mode, (30, 20), (colour,) * (len(mode) - 1) + (255,))
    picture.putalpha(Image.fromarray(255 * MASK))
    picture.save(tmp_path / 'm.png')
    assert np.array_equal(masks.read_mask(tmp_path / 'm.png'), MASK)
    picture = Image.fromarray(255 * MASK).convert(mode)
    picture.putalpha(128)
    picture.save(tmp_path / 'm.png')
    assert np.array_equal(masks.read_mask(tmp_path / 'm.png'), MASK)


# ------------------------------------------------------------ C. palettes and colours
def palette(mask, *colours):
    picture = Image.fromarray(mask).convert('P')
    picture.putdata(mask.ravel().tolist())
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def test_black_is_background_wherever_a_palette_has_it(own):
    own('0', mask=palette(1 - MASK, RED, BLACK))
    own('1', mask=palette(MASK, BLACK, RED))
    own('2', mask=palette(MASK * 5, BLACK, BLUE, BLUE, BLUE, BLUE, RED))
    decide()
    for _, mask in pairs().values():
        assert np.array_equal(mask, MASK)


def test_palettes_that_contradict_are_named(own):
    own('0', mask=palette(MASK, BLACK, RED))
    own('1', mask=palette(0 * MASK, RED))  # by its index it would be background
    with pytest.raises(
        config.UserMistake, match=r'index 0 is \(0, 0, 0\) in .*0.png and \(255, 0, 0\)'
    ):
        decide()
    own('0', mask=palette(MASK, BLACK, RED, BLUE))
    own('1', mask=palette(2 * MASK, BLACK, RED, BLUE))
    decide(CLASSES=3)
    own('1', mask=palette(MASK, BLACK, BLUE, RED))
    with pytest.raises(config.UserMistake, match=r'index 1 is .*0.png .*1.png: set MASK_COLOURS'):
        decide(CLASSES=3)
    decide(CLASSES=3, MASK_COLOURS=[BLACK, RED, BLUE])
    assert np.array_equal(pairs()['1'][1], 2 * MASK)
    assert config.constants()['MASK_COLOURS'][1] == [255, 0, 0]  # YAML knows no tuples


def test_colours_by_a_list(tmp_path):
    colours = [(128, 64, 128), RED, BLUE]
    values = np.zeros((20, 30), np.uint8)
    values[:5], values[5:9] = 1, 2
    file = tmp_path / 'm.png'
    Image.fromarray(np.uint8(colours)[values]).save(file)
    assert np.array_equal(masks.read_mask(file, 3, None, colours), values)
    larger = masks.read_mask(file, 3, None, colours, (40, 60))
    assert np.array_equal(larger, values.repeat(2, 0).repeat(2, 1))
    with pytest.raises(config.UserMistake, match=r'does not list: \(0, 0, 255\): add'):
        masks.read_mask(file, 2, None, colours[:2])
    assert np.array_equal(
        masks.read_mask(file, 2, 7, colours[:2]), np.where(values == 2, 7, values)
    )
    with pytest.raises(config.UserMistake, match='a coloured mask, .*: set MASK_COLOURS'):
        masks.read_mask(file)
    Image.fromarray(255 * MASK).convert('1').save(file)  # the object is black
    assert np.array_equal(masks.read_mask(file, colours=[(255, 255, 255), BLACK]), 1 - MASK)


def test_a_palette_decides_only_where_it_tells_indices_apart(tmp_path):
    file = tmp_path / 'm.png'
    palette(0 * MASK, (255, 255, 255), RED).save(file)  # a white background alone
    assert not masks.read_mask(file).any()
    palette(MASK, BLACK, (255, 255, 255)).save(file)
    assert np.array_equal(masks.read_mask(file), MASK)
    Image.frombytes('P', (30, 20), MASK.tobytes()).save(file)  # no palette: indices
    assert np.array_equal(masks.read_mask(file), MASK)


def test_colours_of_16_bits_and_alpha_that_contradicts_are_refused(tmp_path):
    deep = np.zeros((4, 5, 3), np.uint16)
    deep[:2, :, 2] = 65535
    cv2.imwrite(str(tmp_path / 'm.png'), deep)
    with pytest.raises(config.UserMistake, match=r'm\.png: colours of 16 bits'):
        masks.read_mask(tmp_path / 'm.png', colours=[BLACK, RED])
    picture = Image.fromarray(np.dstack([255 - 255 * MASK] * 3 + [255 * MASK]))  # black on nothing
    picture.save(tmp_path / 'm.png')
    with pytest.raises(config.UserMistake, match='alpha channel are different masks'):
        masks.read_mask(tmp_path / 'm.png')


@pytest.mark.parametrize('values', [MASK, 38 * MASK, np.dstack([0 * MASK, 0 * MASK, 255 * MASK])])
def test_jpeg_masks_that_would_be_empty_are_refused(tmp_path, values):
    Image.fromarray(np.kron(values, np.ones((4, 4) + (1,) * (values.ndim - 2), np.uint8))).save(
        tmp_path / 'm.jpg', quality=95
    )
    if values.max() > 1:
        with pytest.raises(config.UserMistake, match=r'm\.jpg: JPEG blurs masks'):
            masks.read_mask(tmp_path / 'm.jpg')
    with pytest.raises(config.UserMistake, match=r'm\.jpg: JPEG blurs masks'):
        masks.read_mask(tmp_path / 'm.jpg', classes=3)
    Image.fromarray(MASK).save(tmp_path / 'm.webp', lossless=True)
    assert np.array_equal(masks.read_mask(tmp_path / 'm.webp'), MASK)


# ------------------------------------------------------------ D. one listing
def test_one_listing_for_all_folders(own, capsys):
    for name in ('a.png', 'b.PNG', 'c.jpg', '._a.png', 'a_mask.png', 'notes.txt'):
        own(name if '.txt' not in name else 'd', folder='test', mask=None)
        own(name if '.txt' not in name else 'd', mask=None)
    (own.folder / 'img/.hidden').mkdir()
    own('.hidden/x', mask=None)
    vars(config).update(MASK_SUFFIX='_mask.png')
    expected = {name: f'{name}.png' for name in 'ad'} | {'b': 'b.PNG'}
    for constant in ('TRAIN_PATH', 'TEST_PATH'):
        found, others = files.list_files(constant)
        assert {name: file.name for name, file in found.items()} == expected
        assert others == ['c.jpg']
    assert [file.name for file in predictor.list_test_files(MODEL)] == ['a.png', 'b.PNG', 'd.png']
    assert '1 other images in ' in (told := capsys.readouterr().out)
    assert '(.jpg) are not predicted: see TEST_SUFFIX' in told


def test_a_name_that_only_begins_like_a_mask_is_an_image(own):
    for name in ('a', 'a_mid', 'a_mask', 'a_mask_1'):
        own(name, folder='test', mask=None)
    config.MASK_SUFFIX = '_m.png'
    assert [file.name for file in predictor.list_test_files(MODEL)] == [
        'a.png', 'a_mask.png', 'a_mask_1.png', 'a_mid.png']  # fmt: skip
    config.MASK_SUFFIX = '_mask.png'
    assert [file.name for file in predictor.list_test_files(MODEL)] == ['a.png', 'a_mid.png']


def test_a_link_that_leads_back_adds_nothing_and_a_picture_is_not_its_own_mask(own):
    for number in range(2):
        own(f'{number}')
    (own.folder / 'img/loop').symlink_to(own.folder / 'img')
    decide()
    assert folds.read_folds().img.tolist() == ['0', '1']
    with pytest.raises(config.UserMistake, match='the images are their own masks: set MASK_PATH'):
        decide(MASK_PATH=config.TRAIN_PATH)
    with pytest.raises(config.UserMistake, match=r'TRAIN_CSV=typo\.csv: no such file'):
        decide(TRAIN_CSV='typo.csv')


# ------------------------------------------------------------ E. names
def test_one_folder_for_each_image(own):
    for number in range(2):
        own(f'case{number}/image', mask=None)
        own(f'case{number}/mask', MASK, mask=None)
    decide(MASK_PATH=config.TRAIN_PATH, IMAGE_SUFFIX='image.png', MASK_SUFFIX='mask.png')
    assert folds.read_folds().img.tolist() == ['case0', 'case1']
    assert np.array_equal(pairs()['case1'][1], MASK)


def test_names_with_prefixes_folders_and_many_endings(own):
    for number, ending in enumerate(('.jpg', '.JPG', '.jpeg', '.png')):
        own(f'p{number % 2}/image_{number}{ending}', mask_name=f'p{number % 2}/mask_{number}')
    words = {'IMAGE_SUFFIX': ['.jpg', '.jpeg', '.png'], 'IMAGE_PREFIX': 'image_'}
    decide(**words, MASK_PREFIX='mask_', GROUP_REGEX='^(.*)/')
    table = folds.read_folds()
    assert table.img.tolist() == ['p0/0', 'p0/2', 'p1/1', 'p1/3']
    assert table.group.tolist() == ['p0', 'p0', 'p1', 'p1']
    for image, mask in pairs().values():
        assert np.array_equal(mask, MASK) and np.array_equal(image[0] > 60, MASK)


def test_names_are_compared_in_one_unicode_form(own):
    for number in range(2):
        own(f'e\u0301{number}', mask_name=f'\u00e9{number}')
    decide()
    assert folds.read_folds().img.tolist() == ['\u00e90', '\u00e91']


def test_an_image_without_a_mask_is_background_for_who_says_so(own):
    for number in range(4):
        own(f'{number}', mask=MASK if number else None)
    with pytest.raises(config.UserMistake, match='1 images have no mask .*: 0: .*EMPTY_IF_NO_MASK'):
        decide()
    decide(EMPTY_IF_NO_MASK=True)
    assert not pairs()['0'][1].any() and pairs()['1'][1].any()


def test_several_masks_of_an_image_are_named(own):
    for number in range(2):
        own(f'x{number}', mask=None)
        own(f'x{number}_mask', mask=None)
    own('x0_mask_1', mask=None)
    with pytest.raises(config.UserMistake, match=r'more than one mask, such as x0_mask_1\.png'):
        decide(MASK_PATH=config.TRAIN_PATH, MASK_SUFFIX='_mask.png')
    own('0.jpg', mask=None)
    with pytest.raises(config.UserMistake, match=r'have the same name: 0\.jpg and 0\.png'):
        own('0', mask=None)
        decide(IMAGE_SUFFIX=['.jpg', '.png'])


# ------------------------------------------------------------ F. the test set
def test_test_files_have_names_of_their_own_and_are_told_apart(own):
    for patient in ('p0', 'p1'):
        own(f'{patient}/1_test.tif', folder='test', mask=None)
    config.TEST_SUFFIX = '_test.tif'
    test_files = predictor.list_test_files(MODEL)
    batch = predictor.ImageBatches(test_files, model_of((32, 32, 3)))[0]
    assert batch['img'] == ['p0/1_test.tif', 'p1/1_test.tif']


def test_a_training_image_that_is_gone_is_told_in_one_line(own):
    for number in range(4):
        own(f'{number}')
    decide()
    (own.folder / 'img/2.png').unlink()
    told = '^1 images have no image file in TRAIN_PATH: 2: put them back'
    with pytest.raises(config.UserMistake, match=told):
        Lightning_tester.score_out_of_fold({0: ModelStub(), 1: ModelStub()})


class ModelStub:
    image_digests = None


# ------------------------------------------------------------ G. names that cannot be written
@pytest.mark.parametrize('name', [b'a\xff.png', b'a\nb.png'])
def test_names_that_cannot_be_written_are_told_when_listed(own, name):
    own('0')
    try:
        os.rename(
            os.fsencode(own.folder / 'img/0.png'), os.fsencode(own.folder / 'img') + b'/' + name
        )
    except OSError:
        pytest.skip('this disk takes no such name')
    with pytest.raises(config.UserMistake, match='is not UTF-8 text in one line: rename'):
        files.list_files('TRAIN_PATH')


# ------------------------------------------------------------ H. large images
@pytest.mark.filterwarnings('error')
def test_a_large_scan_is_an_image_and_what_memory_cannot_hold_is_said(tmp_path, monkeypatch):
    file = tmp_path / 'large.png'
    Image.new('1', (14000, 14000), 1).save(file)
    assert images.header(file).size == (14000, 14000)
    assert masks.read_mask(file, size=(8, 8)).all()
    monkeypatch.setattr(os, 'sysconf', lambda name: 10_000)  # 0.1 GB
    with pytest.raises(
        config.UserMistake, match=r'large\.png: its pixels take 1 GB, this machine has 0'
    ):
        images.read_image(file)


# ------------------------------------------------------------ I. what folds hold
def test_folds_are_alike_in_size_and_in_what_masks_hold(capsys):
    sizes = [40, 25, 17, 12, 9, 7, 5, 4, 3, 2, 1, 1, 1, 1, 2]
    names = [f'{group}_{n}' for group, size in enumerate(sizes) for n in range(size)]
    for seed in range(20):
        config.GROUP_REGEX, config.N_FOLDS, config.SEED = '^(.*)_', 5, seed
        counts = folds.assign_folds(names, {}).kfold.value_counts()
        assert counts.tolist()[0] == 40 and counts.max() - counts.min() <= 40
        assert counts.tolist()[1] - counts.min() <= 5  # 40 cannot be split
        config.GROUP_REGEX = None
        held = {f'{n:02d}': (0, 1) if n < 8 else (0,) for n in range(40)}
        table = folds.assign_folds(list(held), held)
        assert table.kfold.value_counts().tolist() == [8] * 5
        assert sorted(table[table.img < '08'].kfold.value_counts()) == [1, 1, 2, 2, 2]
    folds.print_folds(table, held)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == '| fold | images | groups | foreground |' and '| all | 40 | 40 | 8 |' in rows


def test_a_class_that_never_occurs_or_is_missing_in_a_fold_is_said(capsys):
    config.CLASSES, config.N_FOLDS, config.GROUP_REGEX = 4, 2, None
    held = {f'{n}': (0, 2) if n else (0, 1, 2) for n in range(6)}
    folds.print_folds(folds.assign_folds(list(held), held), held)
    told = capsys.readouterr().out
    assert 'no mask has class 3' in told
    assert 'has no image with class 1: its score does not measure class 1' in told


# ------------------------------------------------------------ J. meant plainly
def test_jpeg_masks_whose_values_gather_at_both_ends(own, capsys):
    for number in range(4):
        _, disc = draw_ellipse(np.random.default_rng(number), 96, 128)
        own(f'{number}', np.dstack([90 * disc] * 3), 255 * disc, f'{number}.jpg',
            mask_options={'quality': 90})  # fmt: skip
    decide(MASK_SUFFIX='.jpg')
    assert '4 masks are JPEG files, which is lossy: 128 and above' in capsys.readouterr().out
    mask = masks.read_mask(own.folder / 'msk/3.jpg')
    assert (mask != disc).mean() < 0.002
    smooth = np.tile(np.linspace(0, 255, 128).astype(np.uint8), (96, 1))
    own('3', np.dstack([smooth] * 3), smooth, '3.jpg')
    with pytest.raises(config.UserMistake, match=r'3\.jpg: JPEG blurs masks.* 50% lie from 64'):
        decide(MASK_SUFFIX='.jpg')


def test_run_lengths_stand_in_for_mask_files(own):
    for number in range(4):
        own(f'{number}', mask=None)
    rows = {'img': [f'{n}.png' for n in range(4)], 'rle_mask': [masks.rle_encode(MASK)] * 3 + ['']}
    table, config.TRAIN_CSV = pd.DataFrame(rows), str(own.folder / 'train.csv')
    table.to_csv(config.TRAIN_CSV, index=False)
    decide()
    found = {name: mask for name, (_, mask) in pairs().items()}
    assert np.array_equal(found['0'], MASK) and not found['3'].any()
    config.CACHE = True
    assert np.array_equal(pairs()['0'][1], MASK)
    table.rle_mask = '1 100000'
    table.to_csv(config.TRAIN_CSV, index=False)
    with pytest.raises(config.UserMistake, match='0.png: rle_mask in TRAIN_CSV: not the runs of'):
        decide()


# ------------------------------------------------------------ K. found early
@pytest.mark.parametrize('ending', ['.tif', '.bmp', '.webp', '.png', '.jpg', '.gif'])
def test_what_is_cut_off_is_found_by_its_header_check(tmp_path, ending):
    file = tmp_path / f'a{ending}'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    images.header(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(config.UserMistake, match=rf'a\{ending}: not a readable image'):
        images.header(file)


# ------------------------------------------------------------ the README's table
ALPHA = Image.new('RGBA', (30, 20), (9, 9, 9, 0))
ALPHA.putalpha(Image.fromarray(255 * MASK))
COLOURED = np.uint8([BLACK, RED])[MASK]
# Row -> what to save, its ending, keywords of read_mask; then what comes of it for 1 and 3 classes.
TABLE = {
    'grey, 0 and 1; 1 bit': (MASK, '.png', {}, MASK, MASK),
    'grey, 0 and 255; 16 bits with 65535': (
        MASK.astype(np.uint16) * 65535, '.png', {}, MASK, None),
    'grey of 2 or 4 bits; whole numbers of 16 or 32 bits, or floating': (
        MASK.astype(np.float32), '.tif', {}, MASK, MASK),
    'palette of black and one colour': (palette(1 - MASK, RED, BLACK), '.png', {}, MASK, 1 - MASK),
    'palette of other colours': (palette(MASK, RED, BLUE), '.png', {}, MASK, MASK),
    'RGB or RGBA with equal channels': (np.dstack([MASK] * 3), '.png', {}, MASK, MASK),
    'one colour with a mask in the alpha channel': (ALPHA, '.png', {}, MASK, None),
    'any colours, with `MASK_COLOURS = [(r, g, b), ...]`': (
        COLOURED, '.png', {'colours': [BLACK, RED, BLUE]}, MASK, MASK),
    'JPEG, values near 0 and near 255': (255 * MASK, '.jpg', {}, MASK, None),
    'colours without `MASK_COLOURS`, other values, fractions, several pages': (
        COLOURED, '.png', {}, None, None),
    'the value `IGNORE_INDEX`, -1 for example': (
        MASK * np.float32(-1), '.tif', {'ignore_index': -1}, 255 * MASK, 255 * MASK),
}  # fmt: skip


def test_masks_are_read_as_the_readme_says(tmp_path):
    text = (SRC.parent / 'README.md').read_text(encoding='utf-8')
    rows = [
        row.split(' | ') for row in text[text.index('| mask file |') :].split('\n\n')[0].split('\n')
    ]
    rows = {row[0][2:]: row[1:] for row in rows[2:]}
    assert rows.keys() == TABLE.keys()
    for row, (picture, ending, keywords, *expected) in TABLE.items():
        file = tmp_path / f'm{ending}'
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.save(file, **({'quality': 95} if ending == '.jpg' else {}))
        for cell, classes, mask in zip(rows[row], (1, 3), expected):
            assert cell.startswith('refused') == (mask is None) or 'alpha' in row, row
            if mask is None:
                with pytest.raises(config.UserMistake, match=file.name):
                    masks.read_mask(file, classes, **keywords)
            else:
                assert np.array_equal(masks.read_mask(file, classes, **keywords), mask), (
                    row,
                    classes,
                )


# ------------------------------------------------------------ reading itself
def test_shrinking_averages_and_does_not_shift(tmp_path):
    x = np.arange(1920)
    grating = np.tile(np.uint8(127.5 + 127.5 * np.sin(2 * np.pi * x / 15 * 2)), (1280, 1))
    file = tmp_path / 'a.png'
    Image.fromarray(grating).save(file)
    assert images.read_image(file, 1, (256, 256)).std() < 8  # bilinear: 90
    for width in (1918, 1917, 1283):  # sides that 2, 4 and 8 do not all divide
        ramp = np.tile(np.linspace(0, 255, width).astype(np.uint8), (640, 1))
        Image.fromarray(ramp).save(tmp_path / 'a.jpg', quality=100)
        small = images.read_image(tmp_path / 'a.jpg', 1, (80, 96))[..., 0].mean(0)
        centres = (np.arange(96) + 0.5) * width / 96 - 0.5
        assert np.abs(small - centres * 255 / (width - 1)).max() < 1.2


def test_one_side_may_shrink_while_the_other_grows():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 40, 3), dtype=np.uint8)
    small = images.resize(pixels, (30, 80))
    means = pixels.reshape(30, 10, 40, 3).mean(1)
    assert np.abs(small[:, ::2][:, 1:-1] - means[:, 1:-1]).mean() < 12 and small.shape == (
        30,
        80,
        3,
    )
