"""Image and mask files of every kind, and the run-length encoding."""

import io

import numpy as np
import pytest
from conftest import save_mask_gif
from PIL import Image

import config
import images

RNG = np.random.default_rng(1)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
MASK = (RNG.random((20, 30)) < 0.4).astype(np.uint8)


def check_mask(file):
    return images.check(file, images.check_mask_kind)


def saved(tmp_path, picture, name, **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def test_rgb_png_is_read_as_it_is(tmp_path):
    array = images.read_image(saved(tmp_path, Image.fromarray(COLOURS), 'a.png'))
    assert array.dtype == np.uint8 and np.array_equal(array, COLOURS)


def test_jpeg_agrees_with_pillow(tmp_path):
    smooth = np.linspace(0, 255, 64 * 96 * 3).reshape(64, 96, 3).astype(np.uint8)
    file = saved(tmp_path, Image.fromarray(smooth), 'a.jpg', quality=95)
    array = images.read_image(file)
    assert np.abs(array.astype(int) - np.array(Image.open(file)).astype(int)).max() <= 2


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'RGBA', 'LA', 'CMYK'])
def test_other_modes_become_what_pillow_makes_of_them(tmp_path, mode):
    picture = Image.fromarray(COLOURS).convert('RGB' if mode == 'CMYK' else 'RGBA').convert(mode)
    file = saved(tmp_path, picture, 'a.tif')
    array = images.read_image(file)
    assert np.array_equal(array, np.array(Image.open(file).convert('RGB')))


def test_grey_for_one_channel(tmp_path):
    file = saved(tmp_path, Image.fromarray(COLOURS), 'a.png')
    array = images.read_image(file, channels=1)
    assert array.shape == (20, 30, 1)


def test_sixteen_bits_are_refused(tmp_path):
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    with pytest.raises(config.UserMistake, match=r'a\.png: I;16 of 16 bits'):
        images.read_image(saved(tmp_path, deep, 'a.png'))


@pytest.mark.parametrize('suffix', ['jpg', 'png'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_is_applied(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    block = np.zeros((16, 32, 3), np.uint8)
    block[:8, :8] = 255  # a white corner, top left of the stored picture
    file = saved(tmp_path, Image.fromarray(block), f'a.{suffix}', exif=exif, quality=100)
    array = images.read_image(file)
    assert images.check(file).size == array.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    corner = {
        1: (0, 0),
        2: (0, -1),
        3: (-1, -1),
        4: (-1, 0),
        5: (0, 0),
        6: (0, -1),
        7: (-1, -1),
        8: (-1, 0),
    }
    assert array[corner[orientation]].min() > 200
    assert sum(array[c].min() > 200 for c in [(0, 0), (0, -1), (-1, 0), (-1, -1)]) == 1


def test_reduced_decoding_covers_the_size_and_changes_little(tmp_path):
    y, x = np.mgrid[:512, :768]
    waves = 128 + 60 * np.sin(x / 40)[..., None] * np.cos(y / 30)[..., None] * [1, 0.5, -1]
    file = saved(tmp_path, Image.fromarray(waves.astype(np.uint8)), 'a.jpg', quality=95)
    sizes = [(side, side) for side in (512, 257, 256, 128, 64, 8)] + [(256, 64)]
    decoded = (images.decode_jpeg(file.read_bytes(), 3, (512, 768), size) for size in sizes)
    assert [512 // pixels.shape[0] for pixels in decoded] == [1, 1, 2, 4, 8, 8, 2]
    full = images.read_image(file)
    import cv2

    direct = cv2.resize(full, (192, 128), interpolation=cv2.INTER_AREA)
    reduced = images.read_image(file, 3, (128, 192))
    assert np.abs(reduced.astype(int) - direct.astype(int)).mean() < 1


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).resize((300, 200)).save(buffer, 'JPEG')
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def truncated_png():
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(buffer, 'PNG')
    return buffer.getvalue()[:9000]


@pytest.mark.parametrize(
    'data', [b'', b'not an image', truncated_jpeg(), truncated_png(), b'\xff\xd8\xff\xe0garbage']
)
@pytest.mark.parametrize('read', [images.read_image, images.read_mask, images.check, check_mask])
def test_damaged_files_are_named(tmp_path, data, read):
    file = tmp_path / 'bad.jpg'
    file.write_bytes(data)
    with pytest.raises(config.UserMistake, match=r'bad\.jpg: not a readable image'):
        read(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(config.UserMistake, match=r'no\.jpg: No such file'):
        images.read_image(tmp_path / 'no.jpg')


def palette(mask, colours):
    picture = Image.fromarray(mask).convert('P')
    picture.putdata(mask.ravel().tolist())
    picture.putpalette([value for colour in colours for value in colour])
    return picture


BLACK, WHITE, MAROON = (0, 0, 0), (255, 255, 255), (128, 0, 0)


@pytest.mark.parametrize(
    ('picture', 'name'),
    [
        (Image.fromarray(MASK), '01.png'),
        (Image.fromarray(MASK * 255), '0255.png'),
        (Image.fromarray(MASK * 255).convert('1'), '1bit.png'),
        (Image.fromarray(MASK * 255).convert('1'), '1bit.tif'),
        (Image.fromarray(MASK * 255).convert('RGB'), 'rgb.png'),
        (Image.fromarray(MASK * 255).convert('RGBA'), 'rgba.png'),
        (Image.fromarray(MASK * 255).convert('LA'), 'la.png'),
        (Image.fromarray(MASK.astype(np.uint16)), '16bit01.png'),
        (Image.fromarray(MASK.astype(np.uint16) * 65535), '16bit.png'),
        (Image.fromarray(MASK.astype('>u2') * 65535), '16bit.tif'),
        (palette(MASK, [BLACK, WHITE]), 'carvana.gif'),
        (palette(1 - MASK, [WHITE, BLACK]), 'white_first.gif'),  # grey: its greys count
        (palette(MASK, [BLACK, MAROON]), 'voc.png'),
        (palette(MASK, [BLACK, MAROON]), 'voc.gif'),
        (Image.fromarray(MASK), 'grey01.gif'),
        (Image.fromarray(MASK * 255), 'grey0255.gif'),
    ],
)
def test_one_rule_for_all_binary_masks(tmp_path, picture, name):
    mask = images.read_mask(saved(tmp_path, picture, name))
    assert mask.dtype == np.uint8 and np.array_equal(mask, MASK)


def test_carvana_gif_is_0_and_1(tmp_path):
    save_mask_gif(tmp_path / 'm.gif', MASK)
    assert np.array_equal(images.read_mask(tmp_path / 'm.gif'), MASK)
    ignored = images.read_mask(tmp_path / 'm.gif', ignore_index=255)  # its palette is grey
    assert np.array_equal(ignored, 255 * MASK)


@pytest.mark.parametrize('value', [0, 1, 255])
def test_a_mask_of_one_value(tmp_path, value):
    file = saved(tmp_path, Image.new('L', (8, 8), value), 'm.png')
    assert (images.read_mask(file) == (value > 0)).all()


@pytest.mark.parametrize('values', [[0, 2], [0, 1, 255], [0, 128], [0, 3, 250, 255], [7]])
def test_other_values_are_refused_with_the_file_and_the_values(tmp_path, values):
    file = saved(tmp_path, Image.fromarray(RNG.choice(np.uint8(values), (40, 40))), 'm.png')
    with pytest.raises(config.UserMistake) as mistake:
        images.read_mask(file)
    assert 'm.png' in str(mistake.value) and str(values)[1:-1] in str(mistake.value)


def test_the_values_that_do_not_fit_are_the_ones_shown(tmp_path):
    file = saved(
        tmp_path, Image.fromarray(np.uint8([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255]])), 'm.png'
    )
    with pytest.raises(
        config.UserMistake, match='mask values 255; .*0 to 9: set CLASSES or IGNORE_INDEX'
    ):
        images.read_mask(file, classes=10)


def test_masks_that_cannot_hold_classes_are_refused(tmp_path):
    deep = Image.fromarray(MASK.astype(np.uint16) * 300)
    for picture, name, message in (
        (Image.fromarray(COLOURS), 'm.png', 'coloured.*MASK_COLOURS'),
        (deep, 'm.png', 'mask values 300'),
    ):
        with pytest.raises(config.UserMistake, match=f'{name}.*{message}'):
            images.read_mask(saved(tmp_path, picture, name), classes=255)


def test_class_indices_and_ignore_index(tmp_path):
    values = RNG.choice(np.uint8([0, 1, 2, 11, 255]), (30, 30))
    file = saved(tmp_path, Image.fromarray(values), 'm.png')
    assert np.array_equal(images.read_mask(file, classes=12, ignore_index=255), values)
    with pytest.raises(config.UserMistake, match='0 to 11'):
        images.read_mask(file, classes=12)
    file = saved(tmp_path, palette(np.minimum(values, 2), [BLACK, MAROON, WHITE]), 'p.png')
    assert np.array_equal(images.read_mask(file, classes=3), np.minimum(values, 2))


def test_a_grey_gif_keeps_its_values_although_it_is_stored_as_a_palette(tmp_path):
    for values in ([0, 2], [0, 1, 2], [2]):
        mask = RNG.choice(np.uint8(values), (30, 30))
        file = saved(tmp_path, Image.fromarray(mask), 'm.gif')
        assert np.array_equal(images.read_mask(file, classes=3), mask)
    with pytest.raises(config.UserMistake, match='m.gif: mask values 7'):
        images.read_mask(saved(tmp_path, Image.new('L', (9, 9), 7), 'm.gif'))


def test_palette_indices_are_classes_also_where_two_of_them_are_black_and_white(tmp_path):
    file = saved(tmp_path, palette(MASK, [BLACK, WHITE, MAROON]), 'm.png')
    assert np.array_equal(images.read_mask(file, classes=3), MASK)


def test_ignore_index_in_a_binary_mask(tmp_path):
    values = RNG.choice(np.uint8([0, 1, 255]), (30, 30))
    file = saved(tmp_path, Image.fromarray(values), 'm.png')
    assert np.array_equal(images.read_mask(file, ignore_index=255), values)


def test_masks_are_resized_by_the_nearest_pixel_at_the_right_place(tmp_path):
    file = saved(tmp_path, Image.fromarray(MASK), 'm.png')
    small = images.read_mask(file, size=(10, 10))
    assert small.shape == (10, 10)
    assert np.array_equal(small[:, 4], MASK[1::2][:, 13])  # pixel centres 4.5 * 3 = 13.5


def brute_force(mask):
    """Pixel by pixel, from 1, along the rows."""
    runs, previous = [], False
    for position, pixel in enumerate(mask.ravel().tolist(), 1):
        if pixel and not previous:
            runs.append([position, 0])
        if pixel:
            runs[-1][1] += 1
        previous = bool(pixel)
    return ' '.join(f'{start} {length}' for start, length in runs)


@pytest.mark.parametrize('density', [0, 0.02, 0.5, 0.98, 1])
@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1), (7, 11)])
def test_rle_against_brute_force_and_back(density, shape):
    mask = (np.random.default_rng(3).random(shape) < density).astype(np.uint8)
    assert images.rle_encode(mask) == brute_force(mask)
    assert np.array_equal(images.rle_decode(images.rle_encode(mask), shape), mask)


def test_rle_by_hand():
    mask = np.zeros((3, 4), np.uint8)
    assert images.rle_encode(mask) == ''
    mask[0, 0] = 1
    assert images.rle_encode(mask) == '1 1'
    mask[0, 3] = mask[1, 0] = 1  # a run goes on in the next row
    assert images.rle_encode(mask) == '1 1 4 2'
    mask[2, 3] = 1
    assert images.rle_encode(mask) == '1 1 4 2 12 1'
    assert images.rle_encode(np.ones((3, 4), bool)) == '1 12'
    assert images.rle_encode(mask * 255) == '1 1 4 2 12 1'


def test_run_lengths_by_rows_and_by_columns_by_hand():
    """0 1 1 0 / 0 1 0 0 / 1 0 0 1: pixels 2, 3, 6, 9, 12 by rows; 3, 4, 5, 7, 12 by columns."""
    mask = np.uint8([[0, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 1]])
    texts = {'rows': '2 2 6 1 9 1 12 1', 'columns': '3 3 7 1 12 1'}
    for order, text in texts.items():
        assert images.rle_encode(mask, order) == text
        decoded = images.rle_decode(text, (3, 4), order)
        assert np.array_equal(decoded, mask) and decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous and decoded.flags.writeable
    assert images.rle_encode(mask) == texts['rows']


def test_rle_decode_of_an_empty_cell_and_of_nonsense():
    assert not images.rle_decode(float('nan'), (2, 2)).any()
    for wrong in ('1', '0 1', '4 2', '1 2 2 1', '1 0', '3 1 1 1'):
        with pytest.raises(ValueError):
            images.rle_decode(wrong, (2, 2))


def test_a_text_by_the_name_of_an_image_is_told_in_plain_words(tmp_path):
    (tmp_path / 'a.png').write_text('some text')
    with pytest.raises(config.UserMistake, match='a.png: .*it is a text file'):
        images.check(tmp_path / 'a.png')
