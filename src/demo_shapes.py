"""The shapes of the demo's cars, as surfaces in metres."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np

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
