"""Draws cars that look like those of the Carvana challenge: a studio, a rotating plate, 16 sides."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image

from images import rle_encode

SIDES = 16
# Metres; the cabin's rear and front, at its base and at its roof, in halves of the car's length
# (-1 tail, 1 nose); where the side windows part, from the cabin's rear (0) to its front (1).
MEASURES = ('length', 'height', 'clear', 'wheel', 'nose', 'tail', 'belt', 'base', 'roof', 'pillars')
KINDS = {
    'sedan': (4.7, 1.46, 0.20, 0.33, 0.74, 0.93, 0.98, (-0.72, 0.44), (-0.38, 0.06), (0, 0.5, 1)),
    'suv': (4.6, 1.74, 0.29, 0.38, 0.92, 1.05, 1.10, (-0.95, 0.46), (-0.8, 0.16), (0, 0.3, 0.6, 1)),
    'hatch': (4.1, 1.50, 0.20, 0.32, 0.76, 0.90, 0.97, (-0.95, 0.52), (-0.70, 0.10), (0, 0.5, 1)),
    'pickup': (5.1, 1.82, 0.33, 0.39, 1.02, 1.15, 1.17, (-0.20, 0.44), (-0.15, 0.2), (0, 0.45, 1)),
    'van': (4.9, 1.84, 0.22, 0.34, 0.86, 1.00, 1.05, (-0.96, 0.68), (-0.9, 0.3), (0, 0.3, 0.6, 1)),
}
PALE = [(0.80, 0.80, 0.79), (0.76, 0.75, 0.72)]
STRONG = [(0.50, 0.05, 0.06), (0.30, 0.42, 0.52), (0.06, 0.12, 0.32), (0.22, 0.24, 0.26)]
STRONG += [(0.68, 0.38, 0.05), (0.27, 0.20, 0.14), (0.05, 0.05, 0.06), (0.07, 0.24, 0.18)]
DARK, CHROME, LAMP, RED = (0.06, 0.06, 0.06), (0.60, 0.61, 0.63), (0.9, 0.9, 0.9), (0.4, 0.02, 0.02)
# What paint and glass mirror, by the ray's slope: floor, the dark rim of the plate, walls, lamps.
MIRRORED = [-0.6, -0.05, 0.03, 0.3, 0.6, 0.8, 1], [0.3, 0.5, 0.25, 0.7, 0.7, 1.3, 1]


def make_car(car: int, seed: int = 42) -> SimpleNamespace:
    """Shape and colours of car number `car` and of its studio, the same from every side.

    The kinds take turns; every sixth car is about as pale as the studio.
    """
    rng = np.random.default_rng([seed, car])
    kind = list(KINDS)[car % len(KINDS)]
    look = SimpleNamespace(kind=kind, **dict(zip(MEASURES, KINDS[kind])))
    look.half, look.wide = look.length / 2 * rng.uniform(0.96, 1.04), rng.uniform(0.88, 0.96)
    look.height *= rng.uniform(0.97, 1.03)
    look.wheel *= rng.uniform(0.96, 1.04)
    paint = PALE[car // 6 % 2] if car % 6 == 5 else STRONG[(car + seed) % 8]
    look.paint = np.clip(paint + rng.uniform(-0.02, 0.02, 3), 0.03, 0.88)
    look.glass = np.array([0.07, 0.09, 0.10]) * rng.uniform(0.5, 1.8)
    look.gloss, look.spokes = rng.uniform(0.15, 0.35), rng.integers(5, 11)
    look.antenna = rng.random() < 0.7
    look.cladding = kind in ('suv', 'pickup') and rng.random() < 0.5
    look.rails = kind in ('suv', 'van') and rng.random() < 0.8
    look.eye, look.distance, look.turn = rng.uniform((1.6, 9.2, -5), (2.0, 9.8, 5))
    look.wall, look.floor = rng.uniform((0.66, 0.44), (0.74, 0.50))
    look.lamps, look.banner = rng.random() < 0.7, rng.random() < 0.5
    look.plate = rng.uniform(0.4, 0.9, 3)
    return look


def loft(axis, at, a, b, mid_a=0, mid_b=0, power=2, around=40):
    """Super-elliptic sections across an axis (0, 1 or 2): a grid (len(at), around + 1, 3)."""
    angle = np.linspace(0, 2 * np.pi, around + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)])
    ring /= (abs(ring) ** power).sum(0) ** (1 / power)
    grid = np.empty((len(at), around + 1, 3))
    grid[..., axis] = np.reshape(at, (-1, 1))
    for i, half, mid, unit in zip(np.delete(range(3), axis), (a, b), (mid_a, mid_b), ring):
        grid[..., i] = np.reshape(mid, (-1, 1)) + np.reshape(half, (-1, 1)) * unit
    return grid


def car_parts(look, pixel):
    """The car's surfaces: [(grid (n, m, 3), colours (n - 1, m - 1, 3), gloss, centre, lift)].

    x points to the nose, y to the left, z up, in metres. A surface's outside is turned away from
    its centre; `lift` brings what lies on a panel before it. Nothing is thinner than 1.5 pixels.
    """
    parts, half, wide, clear, nose = [], look.half, look.wide, look.clear, look.nose
    tail, belt, top, wheel, paint = look.tail, look.belt, look.height - 0.06, look.wheel, look.paint

    def add(grid, colour, gloss=0.1, centre=(0, 0, 0.7), lift=0.0):
        shape = (grid.shape[0] - 1, grid.shape[1] - 1, 3)
        parts.append((grid, np.broadcast_to(colour, shape), gloss, centre, lift))

    def outline(z):
        """The body's middle, half length and half width at a height."""
        low, high, (rear, front) = [clear, clear + 0.15], [belt, top], zip(look.base, look.roof)
        front = [0.96, 1, 1, 0.96, front[0] + 0.1, *front]
        front = np.interp(z, [*low, nose - 0.1, nose, belt - 0.02, *high], front)
        rear = np.interp(z, [*low, tail - 0.06, tail, *high], [-0.97, -1, -1, -0.97, *rear])
        waist = (belt + clear) / 2 + 0.1
        broad = np.interp(z, [*low, waist, *high], [0.94, 0.99, 1, 0.93, 0.76])
        return (rear + front) / 2 * half, (front - rear) / 2 * half, broad * wide

    def panel(axis, sign, s0, s1, z0, z1, colour, gloss=0.1, lift=0.25, top=None, n=10):
        """What lies on an end (axis 0, s is y) or a side (1, s is x); `top`: s0 and s1 at z1."""
        s = np.linspace(np.linspace(s0, s1, n), np.linspace(*(top or (s0, s1)), n), n)
        z = np.linspace(z0, z1, n)[:, None].repeat(n, 1)
        middle, long, broad = outline(z)
        across, reach = ((s - middle) / long, broad) if axis else (s / broad, long)
        out = sign * (reach * (1 - np.minimum(abs(across), 0.995) ** 6) ** (1 / 6) + 0.004)
        add(np.stack((s, out, z) if axis else (middle + out, s, z), -1), colour, gloss, lift=lift)

    # The body is one surface: sections across z from the sill to the roof, and a dome to close it.
    spans = (clear, top, 24), (nose, belt, 9), (tail, belt, 5)
    z = np.sort(np.concatenate([np.linspace(*span) for span in spans]))
    dome = np.linspace(0, np.pi / 2, 9)[1:]
    sections = np.repeat(outline(z), np.r_[np.ones(len(z) - 1, int), 9], axis=1)
    sections[1:, len(z) :] *= np.cos(dome)
    z = np.r_[z, top + 0.06 * np.sin(dome)]
    sill = z[:-1, None, None] < clear + (0.2 if look.cladding else 0.05)
    body = loft(2, z, *sections[1:], sections[0], power=6, around=72)
    add(body, np.where(sill, DARK, paint), look.gloss)

    z0, z1 = belt + 0.03, top - 0.04
    (m0, l0, w0), (m1, l1, w1) = outline(z0), outline(z1)
    hump, swing = np.sin(np.linspace(0, np.pi, 7)), np.cos(np.linspace(0, np.pi, 7))
    for sign in (-1, 1):
        for rear, front in pairwise(look.pillars):
            ends = np.array([2 * rear - 0.97, 2 * front - 1.03])
            (a, b), slant = m0 + ends * (l0 - 0.12), tuple(m1 + ends * (l1 - 0.12))
            panel(1, sign, a, b, z0, z1, look.glass, 0.4, top=slant)
            panel(1, sign, b, b + 0.025, clear + 0.1, belt - 0.03, paint * 0.4, 0)  # door
            if rear or len(look.pillars) < 4:
                panel(1, sign, a + 0.06, a + 0.24, belt - 0.15, belt - 0.11, CHROME)  # handle
        for x in (-0.62 * half, 0.62 * half):
            hub = (x, sign * (wide - 0.14), wheel)
            arch = loft(1, [sign * wide * 0.97] * 2, [0, wheel * 1.14], [0, wheel * 1.14], x, wheel)
            arch[..., 2] = np.maximum(arch[..., 2], clear + 0.06)
            add(arch, DARK, 0, hub, 0.3)
            y, tyre = sign * (wide - np.array([0.25, 0.25, 0.02])), wheel * np.array([0, 1, 1])
            add(loft(1, y, tyre, tyre, x, wheel), DARK, 0, hub)
            rings = wheel * np.array([1, 0.68, 0.62, 0.18, 0])
            spokes = np.where(np.arange(40)[:, None] * look.spokes / 40 % 1 < 0.5, CHROME, DARK)
            face = np.stack(np.broadcast_arrays(DARK, CHROME, spokes, CHROME))
            add(loft(1, [sign * (wide - 0.01)] * 5, rings, rings, x, wheel), face, 0.1, hub, 0.4)
        x, y, z = m0 + l0 - 0.32 + 0.09 * swing, sign * (wide + 0.02), belt + 0.07
        mirror = loft(0, x, 0.12 * hump, 0.08 * hump, y, z, 3, 16)
        add(mirror, paint * 0.9, look.gloss, mirror.mean((0, 1)), 0.2)
        if look.rails:
            x, thin = np.linspace(m1 - l1 + 0.2, m1 + l1 - 0.2, 12), max(0.015, 0.75 * pixel)
            rail = loft(0, x, 0.02, thin, sign * (w1 - 0.1), top + 0.1, 2, 8)
            add(rail, DARK, 0.2, rail.mean((0, 1)), 0.1)
        window, slant = (0.14 - w0, w0 - 0.14), (0.12 - w1, w1 - 0.12)
        panel(0, sign, *window, z0, z1, look.glass, 0.5, top=slant, n=14)
        panel(0, 1, sign * w0 * 0.56, sign * w0 * 0.93, nose - 0.16, nose - 0.03, LAMP, 0.5)
        panel(0, -1, sign * w0 * 0.7, sign * w0 * 0.95, tail - 0.22, tail - 0.06, RED, 0.3)
        panel(0, sign, -0.7, 0.7, clear + 0.04, clear + 0.13, DARK)  # bumper
        panel(0, sign, -0.26, 0.26, clear + 0.2, clear + 0.32, look.plate, 0, 0.4)
    panel(0, 1, -0.45, 0.45, clear + 0.19, nose - 0.1, DARK, 0.2)  # grille
    if look.kind == 'pickup':  # its load bed
        x, y = np.meshgrid(half * np.linspace(-0.9, -0.25, 20), np.linspace(-1, 1, 9))
        add(np.stack([x, y * (wide - 0.2), np.full_like(x, tail)], -1), DARK, 0, lift=0.6)
    if look.antenna:
        z, thin = np.linspace(top, top + 0.45, 5), max(0.007, 0.75 * pixel)
        mast = loft(2, z, thin, thin, m1 - l1 + 0.3 - (z - top) * 0.4, 0.1, 2, 8)
        add(mast, DARK, 0.1, mast.mean((0, 1)))
    return parts


def project(points, camera):
    """Metres on the plate (x right, y away, z up), (..., 3), to columns and rows (..., 2)."""
    x, y, z = np.moveaxis(np.asarray(points, float), -1, 0)
    y, z, tilt = y + camera.distance, z - camera.eye, np.arctan2(camera.eye - 0.62, camera.distance)
    depth, rise = y * np.cos(tilt) - z * np.sin(tilt), y * np.sin(tilt) + z * np.cos(tilt)
    return np.stack([x, -rise], -1) * (camera.zoom / depth)[..., None] + np.array(camera.size) / 2


def paint_car(parts, turn, camera):
    """The car alone: (H, W, 4) uint8, RGB times coverage, and coverage in 0..255."""
    width, height = camera.size
    scale = 2 if width > 1000 else 4  # painted so much larger, for smooth edges
    canvas = np.zeros((height * scale, width * scale, 4), np.uint8)
    eye, quads, colours, depths = np.array([0, -camera.distance, camera.eye]), [], [], []
    for grid, colour, gloss, centre, lift in parts:
        quad = np.stack([grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]], 2) @ turn
        quad = quad.reshape(-1, 4, 3)
        middle = quad.mean(1)
        normal = np.cross(quad[:, 2] - quad[:, 0], quad[:, 3] - quad[:, 1])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
        normal *= np.sign((normal * (middle - np.array(centre) @ turn)).sum(1, keepdims=True))
        far = np.linalg.norm(eye - middle, axis=1)
        view = (eye - middle) / far[:, None]
        facing = (normal * view).sum(1)
        slope = 2 * facing * normal[:, 2] - view[:, 2]
        shine = gloss * (0.5 + 0.5 * (1 - facing) ** 2) * np.interp(slope, *MIRRORED)
        light = 0.62 + 0.3 * normal[:, 2] + 0.12 * (normal @ (-0.6, -0.6, 0.5))
        shade = colour.reshape(-1, 3) * light[:, None] + shine[:, None]
        for everything, own in ((quads, quad), (colours, shade), (depths, far - lift)):
            everything.append(own[facing > 0])
    quads = (project(np.concatenate(quads), camera) * scale - 0.5) * 16
    quads = quads.round().astype(np.int32)  # sixteenths of a pixel
    colours = np.concatenate(colours).clip(0, 1) * 255
    for i in np.argsort(-np.concatenate(depths), kind='stable'):
        cv2.fillConvexPoly(canvas, quads[i], (*colours[i].tolist(), 255), shift=4)
    return cv2.resize(canvas, camera.size, interpolation=cv2.INTER_AREA)


def paint_studio(look, turn, camera):
    """The studio, the rotating plate and the car's shadow: (H, W, 3) float32 in 0..1."""
    width, height = camera.size

    def fill(image, points, colour):
        points = (project(points, camera) * 16 - 8).round().astype(np.int32)
        cv2.fillPoly(image, [points], colour, cv2.LINE_AA, 4)

    def on_wall(x0, x1, z0, z1):
        return [(x0, 6, z0), (x1, 6, z0), (x1, 6, z1), (x0, 6, z1)]

    edge = project((0, 6, 0), camera)[1] / height
    light = np.array([0.86, 1.04, 1, 0.96, 1.08]) * ([look.wall] * 3 + [look.floor] * 2)
    light = np.interp(np.arange(height) / height, [0, edge / 2, edge - 0.04, edge + 0.06, 1], light)
    image = np.tile(light[:, None, None].astype(np.float32), (1, width, 3))
    for x in np.linspace(-9, 9, 7):
        fill(image, on_wall(x, x + 0.03, 0.1, 6), (look.wall * 0.9,) * 3)
    if look.banner:
        fill(image, on_wall(-9, 9, 2.3, 2.9), (0.16, 0.22, 0.30))
    for x in (-5, -1.7, 1.7, 5) if look.lamps else ():
        fill(image, on_wall(x - 1, x + 1, 3.3, 3.5), (1, 1, 1))
    for radius, shade in ((3.3, 0.8), (3.25, 1.06), (2.6, 1.0), (2.58, 1.06)):
        fill(image, loft(2, [0], radius, radius, around=90)[0], (look.floor * shade,) * 3)
    metre = camera.zoom / camera.distance  # in pixels
    shadow = np.zeros((height, width), np.float32)
    for grow, dark, soft in ((1.12, 0.35, 0.25), (0.98, 0.75, 0.07)):
        layer = np.zeros_like(shadow)
        fill(layer, loft(2, [0], look.half * grow, look.wide * grow, power=5)[0] @ turn, dark)
        shadow = np.maximum(shadow, cv2.GaussianBlur(layer, (0, 0), soft * metre))
    return cv2.GaussianBlur(image, (0, 0), 0.015 * metre) * (1 - shadow[..., None])


def draw_car(car: int, side: int, size=(480, 320), seed: int = 42):
    """Car number `car` from `side` 1 (its front) to 16, at size (width, height).

    Returns the image, (H, W, 3) uint8, and its mask, (H, W) uint8 of 0 and 1.
    """
    look, rng = make_car(car, seed), np.random.default_rng([seed, car, side])
    angle = np.radians((side - 1) * 360 / SIDES + look.turn - 90)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    zoom = 1.5 * min(size[0], 1.5 * size[1]) * rng.uniform(0.99, 1.01)
    camera = SimpleNamespace(eye=look.eye, distance=look.distance, zoom=zoom, size=size)
    alone = paint_car(car_parts(look, look.distance / zoom), turn, camera)
    less = max(1, size[0] // 600)  # the studio is out of focus: fewer pixels do
    camera.zoom, camera.size = zoom / less, (size[0] // less, size[1] // less)
    studio = cv2.resize(paint_studio(look, turn, camera), size)
    cover = alone[..., 3:]
    image = studio * (255 - cover.astype(np.float32)) + alone[..., :3]
    image *= (rng.uniform(0.95, 1.05) * rng.uniform(0.985, 1.015, 3)).astype(np.float32)
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1.5, 4))
    return image.clip(0, 255).round().astype(np.uint8), (cover[..., 0] > 127).astype(np.uint8)


def write_pair(size, seed, job):
    """Write the image and the mask of one side; returns the image's name and its mask's RLE."""
    image_folder, mask_folder, name, car, side = job
    image, mask = draw_car(car, side, size, seed)
    Image.fromarray(image).save(image_folder / f'{name}.jpg', quality=90)
    gif = Image.fromarray(mask)
    gif.putpalette([0, 0, 0, 255, 255, 255])
    gif.save(mask_folder / f'{name}_mask.gif')
    return f'{name}.jpg', rle_encode(mask)


def make_dataset(folder, cars=10, test_cars=2, size=(480, 320), seed=42) -> None:
    """Draw `cars` and unseen `test_cars` from all sides into `folder`, laid out as Carvana's.

    train_hq/*.jpg, train_masks/*_mask.gif, train_masks.csv, test_hq/*.jpg, sample_submission.csv,
    and test_masks_truth/*_mask.gif, which Kaggle keeps to itself. The same bytes for a seed.
    """
    folder, rng, jobs = Path(folder), np.random.default_rng(seed), []
    for car in range(cars + test_cars):
        names = ('train_hq', 'train_masks') if car < cars else ('test_hq', 'test_masks_truth')
        folders, name = [folder / name for name in names], rng.bytes(6).hex()
        for path in folders:
            path.mkdir(parents=True, exist_ok=True)
        jobs += [(*folders, f'{name}_{side:02}', car, side) for side in range(1, SIDES + 1)]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context('spawn')) as pool:
        rows = list(pool.map(partial(write_pair, size, seed), jobs, chunksize=SIDES // 2))
    test = [(name, '1 1') for name, _ in rows[cars * SIDES :]]
    for name, table in (('train_masks', rows[: cars * SIDES]), ('sample_submission', test)):
        lines = ['img,rle_mask', *sorted(map(','.join, table))]
        (folder / f'{name}.csv').write_text('\n'.join(lines) + '\n')
