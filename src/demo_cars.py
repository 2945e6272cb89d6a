"""Draws cars that look like those of the Carvana challenge: a studio, a rotating plate, 16 sides."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from demo_shapes import car_parts, loft, make_car
from masks import rle_encode

SIDES = 16
# What paint and glass mirror, by the ray's slope: floor, the dark rim of the plate, walls, lamps.
MIRRORED = [-0.6, -0.05, 0.03, 0.3, 0.6, 0.8, 1], [0.3, 0.5, 0.25, 0.7, 0.7, 1.3, 1]


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
        rows = pool.map(partial(write_pair, size, seed), jobs, chunksize=SIDES // 2)
        rows = list(tqdm(rows, 'drawing cars', len(jobs), disable=None, leave=False))
    test = [(name, '1 1') for name, _ in rows[cars * SIDES :]]
    for name, table in (('train_masks', rows[: cars * SIDES]), ('sample_submission', test)):
        lines = ['img,rle_mask', *sorted(map(','.join, table))]
        (folder / f'{name}.csv').write_text('\n'.join(lines) + '\n')
