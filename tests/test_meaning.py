"""What files mean, kind by kind: each test draws its own input and asserts the right value."""

import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SRC, draw_ellipse, model_of
from PIL import Image

import command_line
import config
import dataset
import files
import folds
import images
import Lightning_tester
import predictor
from Lightning_module import CarvanaModel

MODEL = model_of((32, 32, 3))
MASK = np.zeros((20, 30), np.uint8)
MASK[2:9, 3:15] = 1
RED, BLACK, BLUE = (255, 0, 0), (0, 0, 0), (0, 0, 255)


def check_mask(file):
    return images.check(file, images.check_mask_kind)


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
    assert images.check(file).size == images.size_of(file) == shown.shape
    assert np.array_equal(images.read_mask(file), shown)
    assert np.array_equal(images.read_image(file, 1)[..., 0] > 127, shown)


def test_a_mask_turned_as_its_image_fits_and_one_that_is_not_is_told(own, capsys):
    for number in range(4):
        own(f'{number}', mask=255 * MASK, **turned(6), mask_options=turned(6))
    decide()
    image, mask = dataset.read_pair(*files.pairs_of(['0'])[0], (30, 20), 3, *images.mask_settings())
    assert np.array_equal(image[..., 0] > 60, mask == 1) and mask.any()
    own('0', **turned(6))
    with pytest.raises(
        config.UserMistake,
        match=r'of 0 have sizes \(30, 20\) and \(20, 30\).*EXIF turns .*exiftool',
    ):
        folds.main()
    for number in range(4):
        own(f'{number}', **turned(3))
    capsys.readouterr()
    decide()
    assert '4 masks have another EXIF rotation' in capsys.readouterr().out


@pytest.mark.parametrize('orientation', [3, 6])
def test_a_jpeg_turned_by_xmp_alone(tmp_path, orientation):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'  # noqa: E501
    file = tmp_path / 'a.jpg'
    Image.fromarray(255 * MASK).save(file, quality=100, xmp=xmp.encode())
    shown = np.rot90(MASK, 2 if orientation == 3 else -1)
    assert images.check(file).size == images.size_of(file) == shown.shape
    assert np.array_equal(images.read_image(file, 1)[..., 0] > 127, shown)
    assert np.array_equal(images.read_mask(file), shown)


# ------------------------------------------------------------ B. bits, sign, pages, fractions, alpha
@pytest.mark.parametrize('ending', ['.png', '.tif', '.ppm'])
def test_sixteen_bits_per_colour_are_refused(tmp_path, ending):
    file = str(tmp_path / f'a{ending}')
    cv2.imwrite(file, np.full((4, 5, 3), 1000, np.uint16))
    for read in (images.read_image, images.check):
        with pytest.raises(config.UserMistake, match=rf'a\{ending}: RGB of 16 bits'):
            read(file)


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


def alpha_of(mode, alpha):
    picture = Image.fromarray(255 * MASK).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    return picture


def save_deep(file, pixels):
    cv2.imwrite(str(file), pixels)


DEEP = np.full((20, 30, 4), 65535, np.uint16)
# Kind of mask -> file name, how to write it, the words of the refusal.
NOT_PLAIN = {
    '2 bits': ('m.png', lambda f: write_png(f, 3 * MASK, 2), 'PNG L of 2 bits'),
    '4 bits': ('m.png', lambda f: write_png(f, 15 * MASK, 4), 'PNG L of 4 bits'),
    'PGM': ('m.pgm', lambda f: Image.fromarray(MASK).save(f), 'a PPM, PGM or PBM file'),
    'PBM': ('m.pbm', lambda f: Image.fromarray(MASK).convert('1').save(f), 'a PPM, PGM or PBM'),
    'floats': ('m.tif', lambda f: Image.fromarray(MASK * np.float32(1)).save(f), 'TIFF F of 32 bits'),
    'NaN': ('m.tif', lambda f: Image.fromarray(MASK * np.float32('nan')).save(f), 'TIFF F of 32 bits'),
    # Pillow writes no signed bytes: the tag SampleFormat says so.
    'signed': ('m.tif', lambda f: Image.fromarray(MASK).save(f, tiffinfo={339: 2}), 'signed bytes'),
    'white is 0': ('m.tif', lambda f: Image.fromarray(MASK).save(f, tiffinfo={262: 0}), '0 is white'),
    'white is 0, 16 bits': (
        'm.tif', lambda f: Image.fromarray(np.uint16(MASK)).save(f, tiffinfo={262: 0}), '0 is white'),
    'alpha': ('m.png', lambda f: alpha_of('LA', 255 * MASK).save(f), 'transparent pixels'),
    'colour and alpha': ('m.png', lambda f: alpha_of('RGBA', 99 * MASK).save(f), 'transparent pixels'),
    'deep alpha': ('m.png', lambda f: save_deep(f, DEEP), 'PNG RGBA of 16 bits'),
    'deep colours': ('m.png', lambda f: save_deep(f, DEEP[..., :3]), 'PNG RGB of 16 bits'),
    'LAB': ('m.tif', lambda f: Image.new('LAB', (30, 20)).save(f), 'TIFF LAB of 8 bits'),
    'CMYK': ('m.tif', lambda f: Image.new('CMYK', (30, 20)).save(f), 'TIFF CMYK of 8 bits'),
}  # fmt: skip


@pytest.mark.parametrize('kind', NOT_PLAIN)
def test_masks_that_are_not_plain_are_refused_with_the_way_to_a_plain_one(tmp_path, kind):
    name, save, words = NOT_PLAIN[kind]
    save(tmp_path / name)
    for rule in ((), (3,), (1, None, [BLACK, RED])):
        with pytest.raises(
            config.UserMistake, match=rf'{name}: a mask .*{words}.*"Make any mask plain"'
        ):
            images.read_mask(tmp_path / name, *rule)


def test_a_mask_of_16_bits_is_not_read_by_its_colours(tmp_path):
    Image.fromarray(MASK.astype(np.uint16) * 65535).save(tmp_path / 'm.png')
    assert np.array_equal(images.read_mask(tmp_path / 'm.png'), MASK)
    with pytest.raises(config.UserMistake, match='m.png: MASK_COLOURS with 16 or 32 bits'):
        images.read_mask(tmp_path / 'm.png', colours=[BLACK, RED])


@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_an_opaque_alpha_channel_passes(tmp_path, mode):
    alpha_of(mode, np.full_like(MASK, 255)).save(tmp_path / 'm.png')
    assert np.array_equal(images.read_mask(tmp_path / 'm.png'), MASK)
    colours = [BLACK, (255, 255, 255)]
    assert np.array_equal(images.read_mask(tmp_path / 'm.png', colours=colours), MASK)


@pytest.mark.parametrize('dtype', [np.int16, np.int32])
@pytest.mark.parametrize('ignored', [-1, -100])
def test_negative_labels_are_refused_or_ignored(tmp_path, dtype, ignored):
    labels = MASK.astype(dtype)
    labels[15:] = ignored
    file = tmp_path / 'm.tif'
    cv2.imwrite(str(file), labels)
    with pytest.raises(config.UserMistake, match=f'mask values {ignored}, 0, 1'):
        images.read_mask(file)
    mask = images.read_mask(file, ignore_index=ignored)
    assert (mask[15:] == 255).all() and np.array_equal(mask[:15], MASK[:15])
    assert images.ignored_value(ignored) == 255


def test_an_ignored_value_above_8_bits(tmp_path):
    labels = MASK.astype(np.uint16) * 2
    labels[15:] = 65535
    Image.fromarray(labels).save(tmp_path / 'm.png')
    mask = images.read_mask(tmp_path / 'm.png', 3, 65535)
    assert (mask[15:] == 255).all() and np.array_equal(mask[:15], 2 * MASK[:15])


def test_pages_are_refused_but_not_an_overview(tmp_path):
    page = Image.fromarray(MASK)
    page.save(tmp_path / 'm.tif', save_all=True, append_images=[page, page])
    for read in (images.read_mask, images.read_image, images.check, check_mask):
        with pytest.raises(config.UserMistake, match=r'm\.tif: a TIFF of 3 pages'):
            read(tmp_path / 'm.tif')
    other = Image.fromarray(1 - MASK)
    page.save(tmp_path / 'm.gif', save_all=True, append_images=[other])
    for check in (images.check, check_mask):
        with pytest.raises(config.UserMistake, match=r'm\.gif: it is animated'):
            check(tmp_path / 'm.gif')
    small = Image.fromarray(MASK[::2, ::2])
    small.encoderinfo = {'tiffinfo': {images.SUBFILE_TYPE: 1}}
    page.save(tmp_path / 'pyramid.tif', save_all=True, append_images=[small])
    assert Image.open(tmp_path / 'pyramid.tif').n_frames == 2
    assert check_mask(tmp_path / 'pyramid.tif').size == MASK.shape
    assert np.array_equal(images.read_mask(tmp_path / 'pyramid.tif'), MASK)


def test_what_is_no_image_is_told_in_true_words(tmp_path):
    import struct

    entries = [(256, 4, 2), (257, 4, 2), (258, 3, 64), (259, 3, 1), (262, 3, 1), (273, 4, 8),
               (277, 3, 1), (278, 4, 2), (279, 4, 32), (339, 3, 1)]  # fmt: skip
    tags = b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in entries)
    tiff = b'II*\0' + struct.pack('<I', 40) + bytes(32) + struct.pack('<H', len(entries)) + tags
    written = {
        'whole numbers of 64 bits.tif': (
            tiff + bytes(4),
            'Pillow does not read files of this kind',
        ),
        'pointer.png': (b'version https://git-lfs.github.com/spec/v1\n', 'a Git LFS pointer'),
        'link.png': (b'../elsewhere/002.png\n', 'it is a text file'),
        'array.npy': (b'\x93NUMPY\x01\0v\0', 'Pillow does not read files of this kind'),
        'empty.png': (b'', 'it is empty'),
    }
    for name, (data, words) in written.items():
        (tmp_path / name).write_bytes(data)
        for read in (images.check, check_mask, images.read_image, images.read_mask):
            with pytest.raises(
                config.UserMistake, match=rf'{name}: not a readable image .*{words}'
            ):
                read(tmp_path / name)
    (tmp_path / 'broken.png').symlink_to('gone.png')
    with pytest.raises(config.UserMistake, match=r'broken\.png: a broken link to gone\.png'):
        images.check(tmp_path / 'broken.png')
    Image.new('LAB', (30, 20)).save(tmp_path / 'lab.tif')
    with pytest.raises(
        config.UserMistake, match=r'lab\.tif: LAB of 8 bits per channel: convert it'
    ):
        images.check(tmp_path / 'lab.tif')


# ------------------------------------------------------------ C. palettes and colours
def palette(mask, *colours):
    picture = Image.fromarray(mask).convert('P')
    picture.putdata(mask.ravel().tolist())
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def test_a_palette_that_does_not_begin_with_black_is_read_by_its_colours_alone(own):
    for number in range(2):
        own(f'{number}', mask=palette(1 - MASK, RED, BLACK))
    told = r'0\.png: index 0 of its palette is \(255, 0, 0\), not black: set MASK_COLOURS'
    with pytest.raises(config.UserMistake, match=told):
        decide()
    decide(MASK_COLOURS=[BLACK, RED])
    for _, mask in pairs().values():
        assert np.array_equal(mask, MASK)
    palette(1 - MASK, (255, 255, 255), BLACK).save(own.folder / 'msk/0.png')
    with pytest.raises(config.UserMistake, match='not black'):
        images.read_mask(own.folder / 'msk/0.png')
    assert np.array_equal(images.read_mask(own.folder / 'msk/0.png', classes=3), 1 - MASK)


@pytest.mark.parametrize('colours', [2, 3, 5, 20])
def test_palettes_of_1_2_4_and_8_bits_hold_values(tmp_path, colours):
    values = (np.arange(600) % colours).reshape(20, 30).astype(np.uint8)
    picture = palette(values, *[(0, 9 * n, 255 - n) for n in range(colours)])
    for ending, options in (('.png', {}), ('.tif', {}), ('.bmp', {}), ('.gif', {})):
        picture.save(tmp_path / f'm{ending}', **options)
        assert np.array_equal(images.read_mask(tmp_path / f'm{ending}', classes=20), values)


def test_a_gif_that_is_all_white_is_an_object(tmp_path):
    Image.new('L', (8, 8), 255).save(tmp_path / 'm.gif')
    assert images.read_mask(tmp_path / 'm.gif').all()
    picture = palette(0 * MASK, (255, 255, 255))
    picture.save(tmp_path / 'm.gif')
    assert images.read_mask(tmp_path / 'm.gif').all()


def test_palettes_of_all_masks_are_compared(own, monkeypatch):
    monkeypatch.setattr(folds, 'MASKS_DECODED', 2)  # more masks than are decoded
    for number in range(7):
        own(f'{number}', mask=palette(MASK + MASK, BLACK, BLUE, RED))
    own('3', mask=palette(MASK, BLACK, RED, BLUE))
    told = r'index 1 is \(0, 0, 255\) in .*0\.png and \(255, 0, 0\) in .*3\.png: set MASK_COLOURS'
    with pytest.raises(config.UserMistake, match=told):
        decide(CLASSES=3)
    decide(CLASSES=3, MASK_COLOURS=[BLACK, BLUE, RED])
    for _, mask in pairs().values():
        assert np.array_equal(mask, 2 * MASK)
    assert config.constants()['MASK_COLOURS'][1] == [0, 0, 255]  # YAML knows no tuples


def test_padded_and_short_palettes_and_those_of_one_class_do_not_differ(own):
    own('0', mask=palette(MASK + MASK, BLACK, BLUE, RED, (7, 7, 7)))
    own('1', mask=palette(MASK, BLACK, BLUE, BLACK))  # the padding of a short palette
    own('2', mask=palette(MASK, BLACK, BLUE))
    decide(CLASSES=3)
    own('1', mask=palette(MASK, BLACK, RED))
    own('0', mask=palette(MASK, BLACK, BLUE))
    decide(CLASSES=1)


def test_colours_by_a_list(tmp_path):
    colours = [(128, 64, 128), RED, BLUE]
    values = np.zeros((20, 30), np.uint8)
    values[:5], values[5:9] = 1, 2
    file = tmp_path / 'm.png'
    Image.fromarray(np.uint8(colours)[values]).save(file)
    assert np.array_equal(images.read_mask(file, 3, None, colours), values)
    larger = images.read_mask(file, 3, None, colours, (40, 60))
    assert np.array_equal(larger, values.repeat(2, 0).repeat(2, 1))
    with pytest.raises(config.UserMistake, match=r'does not list \(0, 0, 255\): add'):
        images.read_mask(file, 2, None, colours[:2])
    assert np.array_equal(
        images.read_mask(file, 2, 7, colours[:2]), np.where(values == 2, 7, values)
    )
    with pytest.raises(config.UserMistake, match='a coloured mask, .*: set MASK_COLOURS'):
        images.read_mask(file)
    Image.fromarray(255 * MASK).convert('1').save(file)  # the object is black
    assert np.array_equal(images.read_mask(file, colours=[(255, 255, 255), BLACK]), 1 - MASK)


@pytest.mark.filterwarnings('error')
def test_a_palette_with_transparent_entries_is_a_palette(tmp_path):
    file = tmp_path / 'm.png'
    palette(MASK, BLACK, RED).save(file, transparency=bytes([0, 255]))
    assert np.array_equal(images.read_mask(file), MASK)
    assert np.array_equal(images.read_mask(file, colours=[BLACK, RED]), MASK)
    assert np.array_equal(images.read_image(file)[..., 0] > 0, MASK)


def test_grey_levels_and_numbered_objects_are_told_with_the_way_out(tmp_path):
    values = MASK.copy()
    values[12:] = 2
    file = tmp_path / 'm.png'
    Image.fromarray(values).save(file)
    told = r'm\.png: mask values 0, 1, 2; CLASSES=1 .*set CLASSES.*merge the objects \(mask > 0\)'
    with pytest.raises(config.UserMistake, match=told):
        images.read_mask(file)
    Image.fromarray(np.uint8([0, 206, 210])[values]).save(file)
    with pytest.raises(config.UserMistake, match='mask values 206, 210; CLASSES=3 .*MASK_COLOURS'):
        images.read_mask(file, 3)
    greys = [BLACK, (206, 206, 206), (210, 210, 210)]
    assert np.array_equal(images.read_mask(file, 3, colours=greys), values)


@pytest.mark.parametrize('values', [MASK, 38 * MASK, np.dstack([0 * MASK, 0 * MASK, 255 * MASK])])
def test_jpeg_masks_that_would_be_empty_are_refused(tmp_path, values):
    Image.fromarray(np.kron(values, np.ones((4, 4) + (1,) * (values.ndim - 2), np.uint8))).save(
        tmp_path / 'm.jpg', quality=95
    )
    if values.max() > 1:
        with pytest.raises(config.UserMistake, match=r'm\.jpg: JPEG blurs values'):
            images.read_mask(tmp_path / 'm.jpg')
    for rule in ((3,), (2, None, [BLACK, RED])):
        with pytest.raises(config.UserMistake, match=r'm\.jpg: JPEG blurs .*MASK_COLOURS=None'):
            images.read_mask(tmp_path / 'm.jpg', *rule)
    Image.fromarray(MASK).save(tmp_path / 'm.webp', lossless=True)
    assert np.array_equal(images.read_mask(tmp_path / 'm.webp'), MASK)


def test_a_jpeg_mask_whose_object_vanishes_when_resized_is_empty_and_not_refused(tmp_path):
    values = np.zeros((200, 200), np.uint8)
    values[11:16, 11:16] = 255
    values[10, 10] = 90  # its edge, the only pixel of it that stays
    file = tmp_path / 'm.jpg'
    Image.fromarray(values).save(file, quality=95)
    assert 1 < np.array(Image.open(file))[10::20, 10::20].max() < 128
    assert not images.read_mask(file, size=(10, 10)).any() and images.read_mask(file).any()


# ------------------------------------------------------------ D. one listing
HIDDEN = ('._a.png', '.hidden/x.png', '@eaDir/a.png/SYNO.png', '__MACOSX/a.png', '@tmp.png')


def test_one_listing_for_all_folders(own, capsys):
    for name in ('a.png', 'b.PNG', 'c.jpg', 'a_mask.png', 'e.jfif', *HIDDEN):
        for folder in ('img', 'test'):
            target = own.folder / folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(MASK).save(target, format='JPEG' if 'j' in target.suffix else None)
    vars(config).update(MASK_SUFFIX='_mask.png')
    expected = {'a': 'a.png', 'b': 'b.PNG'}
    for constant in ('TRAIN_PATH', 'TEST_PATH'):
        found = files.list_files(constant)
        assert {name: file.name for name, file in found.items()} == expected
    assert [file.name for file in predictor.list_test_files(MODEL)] == ['a.png', 'b.PNG']
    told = capsys.readouterr().out
    assert told == (
        "3 files in TEST_PATH are not predicted (.jfif 1, .jpg 1, .png 1; TEST_SUFFIX is '.png')\n"
    )


def test_png_images_to_predict_beside_png_masks_and_jpg_images(own, capsys):
    """The most common layout: no ending of a mask makes a test image a mask."""
    for number in range(6):
        own(f't{number}{".png" if number < 4 else ".jpg"}', folder='test', mask=None)
    vars(config).update(IMAGE_SUFFIX='.jpg', TEST_SUFFIX=['.jpg', '.png'])
    assert len(predictor.list_test_files(MODEL)) == 6
    assert capsys.readouterr().out == ''


def test_the_longest_prefix_and_suffix_decide(own):
    for name in ('a', 'a_mid', 'a_mask', 'a_mask_1', 'b_mask'):
        own(name, folder='test', mask=None)
    config.MASK_SUFFIX = '_m.png'
    assert len(predictor.list_test_files(MODEL)) == 5
    config.MASK_SUFFIX = '_mask.png'  # the image of b_mask.png is not there
    assert [file.name for file in predictor.list_test_files(MODEL)] == [
        'a.png', 'a_mask_1.png', 'a_mid.png', 'b_mask.png']  # fmt: skip
    # Masks with the shorter suffix, in the folder of the images.
    vars(config).update(TRAIN_PATH=config.TEST_PATH, MASK_PATH=config.TEST_PATH)
    vars(config).update(IMAGE_SUFFIX='_mask.png', MASK_SUFFIX='.png')
    assert list(files.list_files('TRAIN_PATH')) == ['a', 'b']
    assert list(files.list_files('MASK_PATH')) == ['a', 'a_mask_1', 'a_mid']


def test_a_file_that_may_be_an_image_and_a_mask_is_refused(own):
    """As in DSB2018: x/images/x.png, and a mask for each object in x/masks."""
    own('x/images/x', mask=None)
    own('x/masks/1', MASK, mask=None)
    told = r'x\.png. may be an image or a mask: .*merge the masks of an image into one'
    for link in (config.TRAIN_PATH, str(own.folder / 'link')):
        (own.folder / 'link').unlink(missing_ok=True)
        (own.folder / 'link').symlink_to(config.TRAIN_PATH)
        with pytest.raises(config.UserMistake, match=told):
            decide(MASK_PATH=link)


def test_files_that_nobody_uses_are_counted(own, capsys):
    for number in range(6):
        own(f'{number}')
    own('6', mask=None)
    (own.folder / 'img/notes.txt').write_text('notes')
    (own.folder / 'msk/labels').write_text('no ending')
    table = own.folder / 'train.csv'
    table.write_text('img\n' + ''.join(f'{n}.png\n' for n in range(4)))
    decide(TRAIN_CSV=str(table))
    told = capsys.readouterr().out
    assert '4 files in TRAIN_PATH are not used (.png 3, .txt 1; IMAGE_SUFFIX is' in told
    assert '3 files in MASK_PATH are not used (.png 2, without ending 1; MASK_SUFFIX is' in told


MIXED = {
    'two folders': {},
    'one suffix, one list': {'IMAGE_SUFFIX': ['.jpg', '.png'], 'TEST_SUFFIX': ['.jpg', '.png']},
    'longer masks': {'MASK_SUFFIX': '_mask.png'},
    'one folder': {'MASK_SUFFIX': '_mask.png', 'MASK_PATH': 'img'},
    'shorter masks in one folder': {'IMAGE_SUFFIX': '_mask.png', 'MASK_PATH': 'img'},
    'prefixes': {'IMAGE_PREFIX': 'im_', 'MASK_PREFIX': 'm_', 'MASK_PATH': 'img'},
}


@pytest.mark.parametrize('table', [False, True])
@pytest.mark.parametrize('kind', MIXED)
def test_each_file_is_used_or_skipped_by_rule_or_counted(own, capsys, kind, table):
    words = {name: value for name, value in MIXED[kind].items() if name != 'MASK_PATH'}
    vars(config).update(words)
    if 'MASK_PATH' in MIXED[kind]:
        config.MASK_PATH = config.TRAIN_PATH
    image_folder, mask_folder, test = (
        config.path(p) for p in (config.TRAIN_PATH, config.MASK_PATH, config.TEST_PATH)
    )
    for folder in {image_folder, mask_folder, test}:
        for name in (
            'notes.txt',
            'sub/Thumbs.db',
            'y.jfif',
            'README',
            '.hidden',
            '@eaDir/0.png',
            '._0.png',
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b'x')
    image_ending, mask_ending = config.endings(config.IMAGE_SUFFIX)[-1], config.MASK_SUFFIX
    for number in range(6):
        for folder, prefix, ending in (
            (image_folder, config.IMAGE_PREFIX, image_ending),
            (mask_folder, config.MASK_PREFIX, mask_ending),
            (test, '', '.png'),
            (test, '', '_mask.png'),
        ):
            Image.fromarray(MASK).save(folder / f'{prefix}{number}{ending}')
    if table:
        config.TRAIN_CSV = str(own.folder / 'train.csv')
        (own.folder / 'train.csv').write_text('img\n' + ''.join(f'{n}\n' for n in range(4)))
    folds.main()
    used = {file for pair in files.pairs_of(folds.image_names()) for file in pair}
    predicted = predictor.list_test_files(MODEL)
    told = capsys.readouterr().out
    counted = {
        c: int(n) for n, c in re.findall(r'^(\d+) files in (\w+) are not', told, re.MULTILINE)
    }
    for constant, names in (('TRAIN_PATH', used), ('MASK_PATH', used), ('TEST_PATH', predicted)):
        folder = config.path(getattr(config, constant))
        here = [file for file in folder.rglob('*') if file.is_file()]
        skipped = [
            file for file in here if {'.', '@'} & {p[0] for p in file.relative_to(folder).parts}
        ]
        if constant == 'MASK_PATH' and mask_folder == image_folder:
            continue
        assert len(skipped) == 3
        assert len(set(here) & set(names)) + len(skipped) + counted[constant] == len(here)
    assert len(used) == (8 if table else 12)


def test_a_folder_is_listed_once_in_a_process(own):
    """Through step 1 and up to the data sets of step 2, in a process of its own, as tests list anew."""
    for number in range(4):
        own(f'{number}')
    code = (
        'import os, sys\n'
        'import command_line, config\n'
        'command_line.override(sys.argv[1:])\n'
        'listed, walk = [], os.walk\n'
        'os.walk = lambda top, **options: listed.append(str(top)) or walk(top, **options)\n'
        'import folds, dataset\n'
        'folds.main()\n'
        'folds.check_up_to_date()\n'
        'data = [dataset.CarvanaDataset([fold]) for fold in (0, 1)]\n'
        'assert sorted(listed) == sorted([config.TRAIN_PATH, config.MASK_PATH]), listed\n'
    )
    words = [f'{name}={value!r}' for name, value in config.constants().items()]
    result = subprocess.run(
        [sys.executable, '-c', code, *words], cwd=SRC, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_link_that_leads_back_adds_nothing_and_a_picture_is_not_its_own_mask(own):
    for number in range(2):
        own(f'{number}')
    (own.folder / 'img/loop').symlink_to(own.folder / 'img')
    decide(OUTPUT=str(own.folder / 'img/out'))  # so is the project's folder
    own('out/picture', mask=None)
    decide()
    assert folds.read_folds().img.tolist() == ['0', '1']
    with pytest.raises(config.UserMistake, match=r'0\.png. may be an image or a mask'):
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


def test_names_with_odd_spaces_are_read(own):
    names = [f'Shot {n}{space}PM' for n, space in enumerate('\u00a0\u202f\u3000\u2009')]
    for name in names:
        own(name)
    decide()
    assert folds.read_folds().img.tolist() == names


def test_an_image_without_a_mask_is_background_for_who_says_so(own):
    for number in range(4):
        own(f'{number}', mask=MASK if number else None)
    told = (
        '1 images have no mask .*: 0: list the images that have masks in .*; .*EMPTY.* really hold'
    )
    with pytest.raises(config.UserMistake, match=told):
        decide()
    decide(EMPTY_IF_NO_MASK=True)
    assert not pairs()['0'][1].any() and pairs()['1'][1].any()
    table = own.folder / 'train.csv'
    table.write_text('img\n1.png\n2\n3.png\n')
    decide(EMPTY_IF_NO_MASK=False, TRAIN_CSV=str(table))
    assert list(pairs()) == ['1', '2', '3']
    table.write_text('img\nimg/1.png\nimg/2.png\n')
    with pytest.raises(
        config.UserMistake, match='img/1, img/2: correct TRAIN_CSV .relative to TRAIN_PATH'
    ):
        decide()


def test_masks_named_otherwise_are_told_with_the_constants_of_names(own):
    for number in range(2):
        own(f'image_{number}', mask_name=f'mask_{number}')
    told = '2 images have no mask .*a mask has the name mask_0: set prefixes and suffixes'
    with pytest.raises(config.UserMistake, match=told):
        decide()
    decide(IMAGE_PREFIX='image_', MASK_PREFIX='mask_')
    assert list(pairs()) == ['0', '1']


@pytest.mark.parametrize('part', ['_mask_1', '_mask(2)', '_mask3'])
def test_several_masks_of_an_image_are_told_where_they_would_be_hidden(own, part):
    for number in range(2):
        own(f'x{number}', mask=None)
        own(f'x{number}_mask', MASK, mask=None)
    words = {'MASK_PATH': config.TRAIN_PATH, 'MASK_SUFFIX': '_mask.png'}
    decide(**words, EMPTY_IF_NO_MASK=True)
    own(f'x0{part}', mask=None)
    with pytest.raises(config.UserMistake, match='1 images have no mask'):
        decide(EMPTY_IF_NO_MASK=False)
    with pytest.raises(config.UserMistake, match=': x0 has more than one mask: merge'):
        decide(EMPTY_IF_NO_MASK=True)


def test_two_files_of_one_name_are_told(own):
    own('0.jpg', mask=None)
    own('0', mask=None)
    with pytest.raises(config.UserMistake, match=r'0\.png. and 0\.jpg have the same name'):
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
    told = '^1 images are not in TRAIN_PATH: 2: .*run folds.py'
    with pytest.raises(config.UserMistake, match=told):
        Lightning_tester.score_out_of_fold({0: ModelStub(), 1: ModelStub()})


class ModelStub:
    image_digests = None


def test_the_submission_has_the_order_of_run_lengths(own, monkeypatch):
    """Read back by its order, it gives the same masks; so does the picture of the samples."""
    config.MODEL_NAME, config.ENCODER_WEIGHTS, config.ACCELERATOR = 'smp_unet_resnet18', None, 'cpu'
    config.NUM_WORKERS, config.PATH = 0, __file__  # it stands for the checkpoint
    torch.manual_seed(0)
    model, shown = CarvanaModel([1], [0]).eval(), []
    own('a', draw_ellipse(np.random.default_rng(3))[0], None, folder='test')
    draw = Lightning_tester.plots.samples
    monkeypatch.setattr(
        Lightning_tester.plots,
        'samples',
        lambda found, n: shown.append(found['a.png'][1]) or draw(found, n),
    )
    texts = []
    for config.RLE_ORDER in ('rows', 'columns'):
        Lightning_tester.predict_test([model], 0.5, predictor.list_test_files(model))
        texts.append(pd.read_csv(own.folder / 'out/submission.csv').rle_mask[0])
    assert texts[0] != texts[1]
    assert np.array_equal(images.rle_decode(texts[0], (48, 64)), shown[0]) and shown[0].any()
    assert np.array_equal(images.rle_decode(texts[1], (48, 64), 'columns'), shown[0])
    assert np.array_equal(shown[0], shown[1])


def test_a_run_with_another_order_of_run_lengths_is_not_resumed():
    saved = config.constants()
    config.RLE_ORDER = 'columns'
    assert config.differing_constants(saved, config.constants()) == ['RLE_ORDER']
    command_line.check()
    config.RLE_ORDER = 'diagonal'
    with pytest.raises(
        config.UserMistake, match="RLE_ORDER='diagonal': must be 'rows' or 'columns'"
    ):
        command_line.check()


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
    with pytest.raises(config.UserMistake, match='has control characters or is not UTF-8: rename'):
        files.list_files('TRAIN_PATH')


def test_a_file_may_have_the_longest_name_that_a_disk_takes(tmp_path):
    file = tmp_path / ('x' * 251 + '.png')
    for text in ('first', 'second'):
        with files.atomic_write(file) as temporary:
            assert temporary.parent == tmp_path and not temporary.exists()
            temporary.write_text(text)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(file.name, 'second')]


# ------------------------------------------------------------ H. large images
@pytest.mark.filterwarnings('error')
def test_a_large_scan_is_an_image(tmp_path):
    file = tmp_path / 'large.png'
    Image.new('1', (14000, 14000), 1).save(file)
    assert images.check(file).size == (14000, 14000)
    assert images.read_mask(file, size=(8, 8)).all()


# ------------------------------------------------------------ I. what folds hold
def test_folds_are_alike_in_size_and_in_what_masks_hold(capsys):
    sizes = [40, 25, 17, 12, 9, 7, 5, 4, 3, 2, 1, 1, 1, 1, 2]
    names = [f'{group:02d}_{n:02d}' for group, size in enumerate(sizes) for n in range(size)]
    for seed in range(20):
        config.GROUP_REGEX, config.N_FOLDS, config.SEED = '^(.*)_', 5, seed
        table = folds.assign_folds(names, {})
        assert (table.groupby('group').kfold.nunique() == 1).all()
        counts = table.kfold.value_counts()
        assert 40 <= counts.max() <= 50 and counts.min() >= 12  # of 130; 40 cannot be split
        config.GROUP_REGEX = None
        classes = {f'{n:02d}': (0, 1) if n < 8 else (0,) for n in range(40)}
        table = folds.assign_folds(list(classes), classes)
        assert table.kfold.value_counts().tolist() == [8] * 5
        assert sorted(table[table.img < '08'].kfold.value_counts()) == [1, 1, 2, 2, 2]
    folds.print_folds(table, classes)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows[0] == ['images', 'groups', 'class', '1'] and ['all', '40', '40', '8'] in rows


def test_the_rarest_class_is_balanced_and_masks_that_are_not_decoded_count_by_themselves():
    config.CLASSES, config.N_FOLDS, config.GROUP_REGEX = 3, 3, None
    names = [f'{n:02d}' for n in range(30)]
    classes = {name: (0, 1, 2) if int(name) < 6 else (0, 1) for name in names[:18]}
    table = folds.assign_folds(names, classes)
    for part in (names[:6], names[6:18], names[18:]):
        counts = table[table.img.isin(part)].kfold.value_counts()
        assert counts.tolist() == [len(part) // 3] * 3
    few = folds.assign_folds(names[4:8], classes)  # two labels, each on fewer images than folds
    assert sorted(few.kfold.value_counts()) == [1, 1, 2]


def test_a_class_that_never_occurs_or_is_missing_in_a_fold_is_said(capsys):
    config.CLASSES, config.N_FOLDS, config.GROUP_REGEX = 4, 2, None
    classes = {f'{n}': (0, 2) if n else (0, 1, 2) for n in range(6)}
    folds.print_folds(folds.assign_folds(list(classes), classes), classes)
    told = capsys.readouterr().out
    rows = [row.split() for row in told.splitlines()]
    assert ['all', '6', '6', '6', '1', '6', '0'] in rows
    assert told.count('a 0 in this table: the score of that fold does not measure that class') == 1


# ------------------------------------------------------------ J. meant plainly
def test_jpeg_masks_whose_values_gather_at_both_ends(own, capsys):
    for number in range(4):
        _, disc = draw_ellipse(np.random.default_rng(number), 96, 128)
        own(f'{number}', np.dstack([90 * disc] * 3), 255 * disc, f'{number}.jpg',
            mask_options={'quality': 90})  # fmt: skip
    decide(MASK_SUFFIX='.jpg')
    assert '4 masks are JPEG files, which is lossy: 128 and above' in capsys.readouterr().out
    mask = images.read_mask(own.folder / 'msk/3.jpg')
    assert (mask != disc).mean() < 0.002
    smooth = np.tile(np.linspace(0, 255, 128).astype(np.uint8), (96, 1))
    own('3', np.dstack([smooth] * 3), smooth, '3.jpg')
    with pytest.raises(config.UserMistake, match=r'3\.jpg: JPEG blurs values .50% lie from 64'):
        decide(MASK_SUFFIX='.jpg')


def test_run_lengths_stand_in_for_mask_files(own, capsys):
    for number in range(4):
        own(f'{number}', mask=None)
    rows = {'img': [f'{n}.png' for n in range(4)], 'rle_mask': [images.rle_encode(MASK)] * 3 + ['']}
    table, config.TRAIN_CSV = pd.DataFrame(rows), str(own.folder / 'train.csv')
    table.to_csv(config.TRAIN_CSV, index=False)
    decide()
    assert '3 masks are run lengths, RLE_ORDER=rows: see test' in capsys.readouterr().out
    found = {name: mask for name, (_, mask) in pairs().items()}
    assert np.array_equal(found['0'], MASK) and not found['3'].any()
    config.CACHE = True
    assert np.array_equal(pairs()['0'][1], MASK)
    table['rle_mask'] = [images.rle_encode(MASK, 'columns')] * 4
    table.to_csv(config.TRAIN_CSV, index=False)
    config.RLE_ORDER = 'columns'
    assert all(np.array_equal(mask, MASK) for _, mask in pairs().values())
    config.RLE_ORDER = 'rows'  # another mask in the cache
    assert not np.array_equal(pairs()['0'][1], MASK)
    data = dataset.CarvanaDataset([0, 1], train=False)
    assert {file.order for _, file in data.files} == {'rows'}  # it goes to spawned workers
    config.CLASSES = 3
    with pytest.raises(config.UserMistake, match='rle_mask has one class, but CLASSES=3'):
        decide()
    config.CLASSES = 1
    table.rle_mask = '1 100000'
    table.to_csv(config.TRAIN_CSV, index=False)
    with pytest.raises(config.UserMistake, match='0.png: rle_mask in TRAIN_CSV: not the runs of'):
        decide()


# ------------------------------------------------------------ K. found early
@pytest.mark.parametrize('ending', ['.tif', '.bmp', '.webp', '.png', '.jpg', '.gif'])
def test_what_is_cut_off_is_found_in_step_1(tmp_path, ending):
    file = tmp_path / f'a{ending}'
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    images.check(file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(config.UserMistake, match=rf'a\{ending}: not a readable image'):
        images.check(file)


def test_zeros_at_the_end_of_a_png_are_found_in_step_1(tmp_path):
    """A download whose room was reserved. Decoding alone gives a wrong mask, without an error."""
    file = tmp_path / 'm.png'
    Image.fromarray(255 * cv2.circle(np.zeros((400, 600), np.uint8), (150, 120), 80, 1, -1)).save(
        file
    )
    check_mask(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 4] + bytes(len(whole) - len(whole) // 4))
    for check in (images.check, check_mask):
        with pytest.raises(config.UserMistake, match=r'm\.png: not a readable image \(broken PNG'):
            check(file)


# ------------------------------------------------------------ the README's table
COLOURED = np.uint8([BLACK, RED])[MASK]
# Beginning of a row -> what to save, its ending, keywords of read_mask; the result for 1 and 3 classes.
TABLE = {
    'values 0 and 1': (MASK, '.png', {}, MASK, MASK),
    'values 0 and 255': (MASK.astype(np.uint16) * 65535, '.png', {}, MASK, None),
    'palette whose index 0': (palette(MASK, BLACK, BLUE), '.png', {}, MASK, MASK),
    'any colours': (COLOURED, '.png', {'colours': [BLACK, RED, BLUE]}, MASK, MASK),
    'JPEG': (255 * MASK, '.jpg', {}, MASK, None),
    'the value `IGNORE_INDEX`': (
        MASK * np.int32(-1), '.tif', {'ignore_index': -1}, 255 * MASK, 255 * MASK),
    'anything else': (COLOURED, '.png', {}, None, None),
}  # fmt: skip
README = (SRC.parent / 'README.md').read_text(encoding='utf-8')


def test_masks_are_read_as_the_readme_says(tmp_path):
    table = README[README.index('| mask file |') :].split('\n\n')[0].split('\n')
    rows = [row.split(' | ') for row in table[2:]]
    assert len(rows) == len(TABLE) == 7
    for row, (start, (picture, ending, keywords, *expected)) in zip(rows, TABLE.items()):
        assert row[0].startswith(f'| {start}')
        file = tmp_path / f'm{ending}'
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        picture.save(file, **({'quality': 95} if ending == '.jpg' else {}))
        for cell, classes, mask in zip(row[1:], (1, 3), expected):
            assert cell.startswith('refused') == (mask is None), row
            if mask is None:
                with pytest.raises(config.UserMistake, match=file.name):
                    images.read_mask(file, classes, **keywords)
            else:
                assert np.array_equal(images.read_mask(file, classes, **keywords), mask), row


FLOATS = np.where(MASK, 1, np.nan).astype(np.float32)
ALPHA = Image.new('RGBA', (30, 20), (9, 9, 9, 0))
ALPHA.putalpha(Image.fromarray(255 * MASK))


@pytest.mark.parametrize(
    ('line', 'array'),
    [(0, FLOATS), (0, 7 * MASK), (0, MASK.astype(np.int64) * 3 - 1), (0, MASK > 0)]
    + [(0, MASK.astype(np.float64)), (1, COLOURED), (1, palette(1 - MASK, RED, BLACK)), (2, ALPHA)],
)
def test_the_readmes_lines_make_any_mask_plain(tmp_path, monkeypatch, line, array):
    monkeypatch.chdir(tmp_path)
    block = next(b for b in README.split('```python\n') if 'mask.png' in b).split('```')[0]
    imports, lines = block.split('\n\n')
    *ways, save = lines.strip().split('\n')
    assert len(ways) == 4  # the last one, of several files, is in test_competitions.py
    if line > 0:
        picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
        picture.save('m.png')
    exec(f'{imports}\n{ways[line]}\n{save}', {'array': array, 'file': 'm.png'})
    assert np.array_equal(images.read_mask(tmp_path / 'mask.png'), MASK)


def test_a_table_with_other_columns_is_told_where_the_lines_are(own):
    own('0', mask=None)
    (own.folder / 'train.csv').write_text('ImageId,EncodedPixels\n0.png,1 1')
    told = 'no column img, only ImageId, EncodedPixels: .*"Other competitions"'
    with pytest.raises(config.UserMistake, match=told):
        decide(TRAIN_CSV=str(own.folder / 'train.csv'))


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
