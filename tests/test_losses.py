"""Every loss of dice_loss.LOSSES: its formula, its gradient, its behaviour at the extremes.

The tests run over LOSSES. A new loss needs a formula in REFERENCE.
"""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config
from dice_loss import LOSSES, build_loss

BIG = (1280, 1918)  # an image of Carvana
POOLED = {'GDiceLossV2'}  # images of a batch depend on each other by definition
UNDEFINED_ON_ONE_LABEL = {'MCCLoss'}
MIXED = {'DC_and_topk_loss', 'ExpLog_loss'}  # pool their Dice alone
CASES = [(name, c) for name in LOSSES for c in (1, 3) if c == 1 or not name.startswith('BCE')]
# Of names with the same formula (CE, BCE, BCE_Dice) the first one is enough for most tests.
FORMULAS = {builder().formula.func: name for name, builder in reversed(LOSSES.items())}
every_loss = pytest.mark.parametrize(
    'name, classes', [(name, c) for name, c in CASES if name in FORMULAS.values()]
)


def scene(classes, n=2, size=(7, 9), ignored=0.0, seed=0, block=3, dtype=torch.float32):
    """Random logits, and masks of blocks in which every image holds every class."""
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, 2, (n, classes, *size)), dtype=dtype)
    grid = [math.ceil(side / block) for side in size]
    blocks = [rng.permutation(math.prod(grid)).reshape(grid) % max(2, classes) for _ in range(n)]
    mask = np.kron(blocks, np.ones((block, block), int))[:, : size[0], : size[1]]
    mask[rng.random(mask.shape) < ignored] = 255
    return logits, torch.tensor(mask)


def confident(mask, classes, logit=60.0):
    """Logits +-`logit` that predict `mask`."""
    if classes == 1:
        return (mask[:, None] * 2.0 - 1) * logit
    return (F.one_hot(mask, classes).movedim(-1, 1) * 2.0 - 1) * logit


def value_and_gradient(name, logits, mask, scale=1, **args):
    logits = logits.detach().clone().requires_grad_()
    value = build_loss(name, logits.shape[1], **args)(logits, mask)
    (value * scale).backward()
    return value.item(), logits.grad.to(value.dtype) / scale


# ------------------------------------------------------- formulas, in NumPy and float64
def overlap(index):
    """The mean of 1 - index(p, y) over classes, or of the foreground only if binary."""

    def reference(p, y, classes, **_):
        return np.mean([1 - index(p[k], y[k]) for k in range(classes == 1, len(p))])

    return reference


def dice(p, y):
    return (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def iou(p, y):
    return ((p * y).sum() + 1) / (p.sum() + y.sum() - (p * y).sum() + 1)


def tversky(p, y, fp=0.3, fn=0.7):
    both = (p * y).sum()
    return (both + 1) / (both + fp * (p * (1 - y)).sum() + fn * ((1 - p) * y).sum() + 1)


def f_beta(p, y, b2=1.5**2):
    both = (1 + b2) * ((p * y).sum() + 1)
    return both / (both + b2 * ((1 - p) * y).sum() + (p * (1 - y)).sum())


def sensitivity_specificity(p, y):
    inside = ((y - p) ** 2 * y).sum() / (y.sum() + 1)
    return 1 - 0.1 * inside - 0.9 * ((y - p) ** 2 * (1 - y)).sum() / ((1 - y).sum() + 1)


def mcc(p, y):
    tp, fp, fn, tn = ((a * b).sum() for a, b in ((p, y), (p, 1 - y), (1 - p, y), (1 - p, 1 - y)))
    return (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def generalised_dice(p, y, **_):
    w = 1 / y.sum(1) ** 2
    return 1 - 2 * (w * (p * y).sum(1)).sum() / (w * (p + y).sum(1)).sum()


def penalty(p, y, **_):
    index = 1 - generalised_dice(p, y)
    return 1 - index / (1 + 2.5 * (1 - index))


def cross_entropy(p, y, weights=1.0, **_):
    """Mean over pixels of -w ln p; weights: a number per class or pixel."""
    w = np.broadcast_to(np.reshape(weights, (-1, 1)) * y if np.ndim(weights) else y, y.shape)
    return -(w * np.log(p)).sum() / w.sum()


def top_k(p, y, **_):
    ce = sorted(-np.log((p * y).sum(0)))
    return np.mean(ce[-max(1, int(len(ce) * 0.10)) :])


def weights_from_output(p, y, **_):
    return cross_entropy(p, y, (1 - p).sum(1) / p.sum(1))


def distance_penalty(p, y, label, place, **_):
    phi = np.zeros(len(label))
    between = np.linalg.norm(place[:, None] - place[None], axis=2)
    between[label[:, None] == label] = np.inf
    depth = between.min(1)  # to the nearest pixel of another label
    for k in np.unique(label):
        d = depth[label == k]
        phi[label == k] = (d.max() - d) / np.ptp(d) if np.ptp(d) else 1
    return -((1 + phi) * np.log((p * y).sum(0))).mean()


def exponential_logarithmic(p, y, classes, **_):
    one = np.mean([(-np.log(dice(p[k], y[k]))) ** 0.3 for k in range(classes == 1, len(p))])
    frequency = y.mean(1)
    w = (y * np.sqrt(frequency.sum() / frequency)[:, None]).sum(0)
    return 0.8 * one + 0.2 * (w * (-np.log((p * y).sum(0))) ** 0.3).mean()


def focal(p, y, **_):
    p = (p * y).sum(0)
    return -((1 - p) ** 2 * np.log(p)).mean()


def lovasz(p, y, x, classes, **_):
    """The Lovasz extension by its definition: the Jaccard distance of the i worst pixels."""
    found = []
    for k in range(classes == 1, len(p)):
        hinge = np.maximum(0, 1 - x[0] * (2 * y[1] - 1))
        errors = hinge if classes == 1 else np.abs(y[k] - p[k])
        order, wrong, before, total = np.argsort(-errors), np.zeros(len(errors)), 0, 0
        for i in order:
            wrong[i] = 1
            now = wrong.sum() / np.maximum(wrong, y[k]).sum()
            total, before = total + errors[i] * (now - before), now
        found += [total]
    return np.mean(found)


def plus(one, two, a=1, b=1):
    return lambda *args, **more: a * one(*args, **more) + b * two(*args, **more)


REFERENCE = {
    'GDiceLoss': generalised_dice,
    'GDiceLossV2': generalised_dice,
    'SSLoss': overlap(sensitivity_specificity),
    'SoftDiceLoss': overlap(dice),
    'IoULoss': overlap(iou),
    'TverskyLoss': overlap(tversky),
    'FocalTversky_loss': overlap(lambda p, y: 1 - (1 - tversky(p, y)) ** 0.75),
    'AsymLoss': overlap(f_beta),
    'DC_and_CE_loss': plus(overlap(dice), cross_entropy),
    'PenaltyGDiceLoss': penalty,
    'DC_and_topk_loss': plus(overlap(dice), top_k),
    'ExpLog_loss': exponential_logarithmic,
    'CrossentropyND': cross_entropy,
    'TopKLoss': top_k,
    'WeightedCrossEntropyLoss': cross_entropy,
    'WeightedCrossEntropyLossV2': weights_from_output,
    'DisPenalizedCE': distance_penalty,
    'BCE': cross_entropy,
    'CE': cross_entropy,
    'BCE_Dice': plus(overlap(dice), cross_entropy, 0.5, 0.5),
    'CE_Dice': plus(overlap(dice), cross_entropy, 0.5, 0.5),
    'FocalLoss': focal,
    'LovaszLoss': lovasz,
    'MCCLoss': overlap(mcc),
}


def reference(formula, logits, mask, pool=False, **args):
    """The mean of `formula` over images. Each is a list of its valid pixels."""
    classes, images = logits.shape[1], []
    for x, label in zip(logits.double().numpy(), mask.numpy()):
        place = np.argwhere(label != 255)
        images += [(x[:, label != 255], label[label != 255], place)]
    if pool:
        images = [
            [np.concatenate(parts, -1) for parts in zip(*((x, t) for x, t, _ in images))] + [0]
        ]
    values = []
    for x, label, place in images:
        p = np.exp(x) / np.exp(x).sum(0)
        if classes == 1:
            p = np.concatenate([1 / (1 + np.exp(x)), 1 / (1 + np.exp(-x))])
        y = np.eye(len(p))[label].T
        values += [formula(p, y, x=x, label=label, place=place, classes=classes, **args)]
    return np.mean(values)


@pytest.mark.parametrize('name, classes', CASES)
@pytest.mark.parametrize('ignored', [0, 0.2])
def test_formula(name, classes, ignored):
    logits, mask = scene(classes, ignored=ignored)
    wanted = reference(REFERENCE[name], logits, mask, name in POOLED)
    found = build_loss(name, classes, ignore_index=255 if ignored else None)(logits, mask)
    assert found.dtype == torch.float32 and found.ndim == 0
    assert found.item() == pytest.approx(wanted, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(
    'name, classes, args, formula',
    [
        (
            'TverskyLoss',
            3,
            {'alpha': 0.5, 'beta': 0.2},
            overlap(lambda p, y: tversky(p, y, 0.5, 0.2)),
        ),
        ('SoftDiceLoss', 3, {'smooth': 0}, overlap(lambda p, y: 2 * (p * y).sum() / (p + y).sum())),
        ('AsymLoss', 1, {'beta': 2}, overlap(lambda p, y: f_beta(p, y, 4))),
        ('CE_Dice', 3, {'dice_weight': 0.2}, plus(overlap(dice), cross_entropy, 0.2, 0.8)),
        (
            'WeightedCrossEntropyLoss',
            1,
            {'weights': [1, 3]},
            lambda p, y, **_: cross_entropy(p, y, [1, 3]),
        ),
        ('FocalLoss', 3, {'gamma': 0}, cross_entropy),
        ('TopKLoss', 3, {'k': 100}, cross_entropy),
        ('PenaltyGDiceLoss', 3, {'k': 0}, generalised_dice),
        ('SoftDiceLoss', 3, {'do_bg': False}, lambda p, y, **_: overlap(dice)(p[1:], y[1:], 3)),
    ],
)
def test_formula_with_arguments(name, classes, args, formula):
    logits, mask = scene(classes, seed=1)
    found = build_loss(name, classes, **args)(logits, mask).item()
    assert found == pytest.approx(reference(formula, logits, mask), abs=1e-5)


LN2 = math.log(2)


@pytest.mark.parametrize(
    'name, wanted',
    [  # p = 1/2 everywhere, one of four pixels is foreground: tp = fn = 1/2, fp = tn = 3/2
        ('SoftDiceLoss', 1 - 2 / 4),
        ('IoULoss', 1 - 1.5 / 3.5),
        ('TverskyLoss', 1 - 1.5 / (1.5 + 0.45 + 0.35)),
        ('FocalTversky_loss', (0.8 / 2.3) ** 0.75),
        ('AsymLoss', 1 - 1.5 / (1.5 + 0.5 * 2.25 / 3.25 + 1.5 / 3.25)),
        ('SSLoss', 0.1 * 0.25 / 2 + 0.9 * 0.75 / 4),
        ('GDiceLoss', 1 - 0.375),  # weights 1 and 1/9: 2 (1/2 + 1/6) / (3 + 5/9)
        ('PenaltyGDiceLoss', 1 - 0.375 / (1 + 2.5 * 0.625)),
        ('MCCLoss', 1),
        ('BCE', LN2),
        ('TopKLoss', LN2),
        ('FocalLoss', LN2 / 4),
        ('DC_and_CE_loss', 0.5 + LN2),
        ('DisPenalizedCE', (2 + 2 + 2 + 1) / 4 * LN2),  # the corner opposite is deepest
        ('ExpLog_loss', LN2**0.3 * (0.8 + 0.2 * (2 + 3 * math.sqrt(4 / 3)) / 4)),
        ('LovaszLoss', 1),
    ],
)
def test_by_hand(name, wanted):
    mask = torch.tensor([[[1, 0], [0, 0]]])
    assert build_loss(name)(torch.zeros(1, 1, 2, 2), mask).item() == pytest.approx(wanted, abs=1e-5)


def test_equal_to_monai():
    monai = pytest.importorskip('monai.losses')
    for classes in (1, 3):
        logits, mask = scene(classes, seed=2)
        head = {'sigmoid': True} if classes == 1 else {'softmax': True, 'to_onehot_y': True}
        two = torch.cat([-logits, logits], 1) / 2 if classes == 1 else logits  # a softmax of two
        both = {'softmax': True, 'to_onehot_y': True}
        one = {'smooth_nr': 1, 'smooth_dr': 1}
        tiny = {'smooth_nr': 1e-9, 'smooth_dr': 1e-9}
        cases = [
            ('SoftDiceLoss', {}, monai.DiceLoss(**head, **one), logits),
            ('IoULoss', {'smooth': 0.5}, monai.DiceLoss(**head, **one, jaccard=True), logits),
            ('TverskyLoss', {}, monai.TverskyLoss(**head, **one, alpha=0.3, beta=0.7), logits),
            ('GDiceLoss', {}, monai.GeneralizedDiceLoss(**both, **tiny), two),
            ('GDiceLossV2', {}, monai.GeneralizedDiceLoss(**both, **tiny, batch=True), two),
            ('DC_and_CE_loss', {}, monai.DiceCELoss(**head, **one), logits),
        ]
        for name, args, other, x in cases:
            found = build_loss(name, classes, **args)(logits, mask).item()
            assert found == pytest.approx(other(x, mask[:, None].float()).item(), abs=1e-5), name
        soft = monai.FocalLoss(use_softmax=True, to_onehot_y=True)(two, mask[:, None])
        found = build_loss('FocalLoss', classes)(logits, mask).item()
        assert found == pytest.approx(soft.item() * two.shape[1], abs=1e-5)  # a mean over classes


def test_equal_to_smp_and_torch():
    smp = pytest.importorskip('segmentation_models_pytorch').losses
    for classes in (1, 3):
        logits, mask = scene(classes, seed=3)
        other = smp.LovaszLoss('binary' if classes == 1 else 'multiclass', per_image=True)
        found = build_loss('LovaszLoss', classes)(logits, mask)
        torch.testing.assert_close(found, other(logits, mask))
    for x, y in zip(logits[:, :1], mask.clamp_max(1)):
        for name, other in (
            ('FocalLoss', smp.FocalLoss('binary')(x, y)),
            ('MCCLoss', smp.MCCLoss()(x.sigmoid(), y[None])),
        ):
            torch.testing.assert_close(build_loss(name)(x[None], y[None]), other)
    weighted = build_loss('WeightedCrossEntropyLoss', 3, weights=[1, 2, 0.5])(logits[:1], mask[:1])
    other = F.cross_entropy(logits[:1], mask[:1], weight=torch.tensor([1, 2, 0.5]))
    torch.testing.assert_close(weighted, other)


# ------------------------------------------------------- gradients
@every_loss
def test_gradcheck(name, classes):
    logits, mask = scene(classes, 2, (2, 4), seed=4, block=1, dtype=torch.float64)
    mask[0, 0, 0] = 255
    loss = build_loss(name, classes, ignore_index=255)
    assert loss(logits, mask).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(x, mask), logits.requires_grad_(), atol=1e-6)


@every_loss
def test_ten_steps_lower(name, classes):
    logits, mask = scene(classes, n=1, seed=5)
    logits.requires_grad_()
    loss, adam = build_loss(name, classes), torch.optim.Adam([logits], lr=0.05)
    values = []
    for _ in range(11):
        values += [loss(logits, mask)]
        adam.zero_grad()
        values[-1].backward()
        adam.step()
    assert all(after < before for before, after in zip(values, values[1:]))


@every_loss
@pytest.mark.parametrize('content', ['empty', 'full', 'half'])
def test_confident_mistakes_are_corrected(name, classes, content):
    """At logits of +-60, sigmoid and softmax are 0 or 1 in float32, and torch's gradient is 0."""
    top = max(2, classes) - 1
    mask = torch.full((1, 6, 5), 0 if content == 'empty' else top)
    mask[:, : 3 if content == 'half' else 0] = 0
    # No ties: of equally wrong pixels, TopKLoss and LovaszLoss correct some.
    noise = torch.linspace(0, 1, 30).reshape(6, 5)
    wrong = confident(top - mask, classes) + noise * confident(top - mask, classes, 1)
    value, gradient = value_and_gradient(name, wrong, mask)
    assert math.isfinite(value) and gradient.isfinite().all()
    if name not in UNDEFINED_ON_ONE_LABEL or content == 'half':
        assert (gradient * confident(mask, classes) <= 0).all()  # none away from the truth
        assert build_loss(name, classes)(wrong - 130 * gradient.sign(), mask) < value


@every_loss
def test_gradient_of_confident_mistakes_is_precise(name, classes):
    """At logits of +-20, float32 represents p (1 - p) = 2e-9, but not 1 - p."""
    _, mask = scene(classes, size=(20, 30), seed=6)
    noise = torch.randn(2, classes, 20, 30, generator=torch.Generator().manual_seed(0))
    logits = confident((mask + 1) % max(2, classes), classes, 20.0) + noise
    _, gradient = value_and_gradient(name, logits, mask)
    _, precise = value_and_gradient(name, logits.double(), mask)
    if (name, classes) != ('LovaszLoss', 3):  # float32 cannot tell the order of its errors
        assert (gradient - precise).norm() < 0.02 * precise.norm()


@pytest.mark.parametrize('name', ['SoftDiceLoss', 'IoULoss', 'GDiceLoss'])
def test_a_large_empty_mask_teaches(name):
    """In float32 (a + 1) - a is 0 here. So would be a gradient that is written as a difference."""
    value, gradient = value_and_gradient(
        name, torch.full((1, 1, *BIG), 20.0), torch.zeros(1, *BIG).byte()
    )
    assert value > 0.5 and (gradient > 0).all()


@every_loss
def test_perfect_prediction(name, classes):
    _, mask = scene(classes)
    value, gradient = value_and_gradient(name, confident(mask, classes), mask)
    assert 0 <= value < 1e-5 and gradient.isfinite().all()
    if name not in UNDEFINED_ON_ONE_LABEL:
        for label in range(max(2, classes)):  # also of empty and of full masks
            mask = torch.full_like(mask, label)
            value, gradient = value_and_gradient(name, confident(mask, classes), mask)
            assert 0 <= value < 1e-5 and gradient.isfinite().all()


@every_loss
def test_never_negative(name, classes):
    for seed in range(3):
        logits, mask = scene(classes, n=1, size=(4, 4), seed=seed, block=2)
        for factor in (0, 0.1, 10, 1000):
            value, gradient = value_and_gradient(name, logits * factor, mask)
            assert 0 <= value < math.inf and gradient.isfinite().all()


# ------------------------------------------------------- half precision
@pytest.fixture(scope='module')
def big():
    """Logits that float16 represents exactly, and the mask of a disc."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(BIG[0]), torch.arange(BIG[1]), indexing='ij')
    mask = ((y - 600) ** 2 + (x - 900) ** 2 < 350**2).to(torch.uint8)[None]
    noise = torch.randn(1, 1, *BIG, generator=generator)
    return ((mask[:, None] * 2 - 1 + 2 * noise).clamp(-7, 7) * 16).round() / 16, mask


@pytest.mark.parametrize('name', sorted(set(FORMULAS.values()) - POOLED))
def test_half_precision_at_full_size(name, big):
    """float16 as with a GradScaler. test_autocast_changes_nothing has bfloat16."""
    logits, mask = big
    value, gradient = value_and_gradient(name, logits, mask)
    assert math.isfinite(value) and gradient.isfinite().all() and gradient.abs().max() > 0
    half_value, half = value_and_gradient(name, logits.half(), mask, scale=2**16)
    assert half_value == pytest.approx(value, rel=1e-2)
    assert (half - gradient).norm() < 1e-2 * gradient.norm()


@every_loss
def test_autocast_changes_nothing(name, classes):
    logits, mask = scene(classes)
    wanted = value_and_gradient(name, logits, mask)
    with torch.autocast('cpu', torch.bfloat16):
        found = value_and_gradient(name, logits, mask)
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])
    half = value_and_gradient(name, logits.bfloat16(), mask)
    assert half[0] == pytest.approx(wanted[0], rel=1e-2) and half[1].isfinite().all()


# ------------------------------------------------------- batches and ignored pixels
@every_loss
def test_images_do_not_depend_on_their_batch(name, classes):
    logits, mask = scene(classes, n=3, ignored=0.1)
    mask[1] = mask[1].clamp_max(0)  # an empty mask beside full ones
    args = {'ignore_index': 255} | ({'batch_dice': False} if name in POOLED else {})
    value, gradient = value_and_gradient(name, logits, mask, **args)
    alone = [value_and_gradient(name, x[None], y[None], **args) for x, y in zip(logits, mask)]
    assert value == pytest.approx(np.mean([one for one, _ in alone]), rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat([g for _, g in alone]) / 3, rtol=1e-4, atol=1e-7)


@every_loss
def test_batch_dice_pools(name, classes):
    """For pure overlap losses, a pooled batch is one large image."""
    logits, mask = scene(classes, n=2)
    takes = inspect.signature(build_loss(name, classes).formula).parameters
    if 'batch_dice' in takes and name not in MIXED:
        loss = build_loss(name, classes, batch_dice=True)
        long = loss(torch.cat([*logits], 1)[None], torch.cat([*mask])[None])
        torch.testing.assert_close(loss(logits, mask), long)


@every_loss
def test_ignored_pixels_count_nowhere(name, classes):
    logits, mask = scene(classes, n=2, ignored=0.3)
    value, gradient = value_and_gradient(name, logits, mask, ignore_index=255)
    ignored = (mask == 255)[:, None].expand_as(logits)
    assert (gradient[ignored] == 0).all() and gradient[~ignored].any()
    other = torch.where(ignored, logits * -9 + 3, logits)
    assert value_and_gradient(name, other, mask, ignore_index=255)[0] == pytest.approx(
        value, rel=1e-6
    )


@every_loss
def test_image_ignored_altogether(name, classes):
    logits, mask = scene(classes, n=2)
    alone = build_loss(name, classes, ignore_index=255)(logits[:1], mask[:1]).item()
    mask[1] = 255
    value, gradient = value_and_gradient(name, logits, mask, ignore_index=255)
    assert value == pytest.approx(alone if name in POOLED else alone / 2, rel=1e-5)
    assert gradient.isfinite().all() and not gradient[1].any()
    value, gradient = value_and_gradient(name, logits[1:], mask[1:], ignore_index=255)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_mask_types(dtype):
    logits, mask = scene(1)
    assert build_loss('IoULoss')(logits, mask.to(dtype)) == build_loss('IoULoss')(logits, mask)


# ------------------------------------------------------- the table, and users' mistakes
def test_every_name_is_there_and_builds_afresh():
    assert set(LOSSES) == set(REFERENCE)
    for name, builder in LOSSES.items():
        one, two = builder(), build_loss(name)
        assert isinstance(one, torch.nn.Module) and one is not two
        assert one.formula is not two.formula and one.formula.func.__doc__
        assert not list(one.parameters()) and not one.state_dict()
        logits, mask = scene(1)
        assert pickle.loads(pickle.dumps(one))(logits, mask) == copy.deepcopy(two)(logits, mask)


@pytest.mark.parametrize(
    'name, classes, args, words',
    [
        ('iouloss', 1, {}, ['iouloss', 'did you mean IoULoss?', *LOSSES]),
        ('Quadratic', 1, {}, ['Quadratic', 'MCCLoss']),
        ('TverskyLoss', 1, {'alfa': 1}, ['alfa', 'did you mean alpha?', 'beta=0.7']),
        ('BCE', 3, {}, ['BCE', 'CLASSES=3', 'use CE']),
        ('BCE_Dice', 2, {}, ['CLASSES=2', 'use CE_Dice']),
    ],
)
def test_mistakes_are_named_when_built(name, classes, args, words):
    with pytest.raises(config.UserMistake) as caught:
        build_loss(name, classes, **args)
    assert all(word in str(caught.value) for word in words) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'classes, logits, mask, words',
    [
        (3, (2, 1, 4, 4), torch.zeros(2, 4, 4).long(), 'logits (N, 3, H, W)'),
        (1, (2, 1, 4, 4), torch.zeros(2, 1, 4, 4).long(), 'masks (N, H, W)'),
        (1, (2, 1, 4, 4), torch.zeros(2, 4, 4), 'int masks'),
    ],
)
def test_mistakes_are_named_when_called(classes, logits, mask, words):
    with pytest.raises(config.UserMistake) as caught:
        build_loss('IoULoss', classes)(torch.zeros(logits), mask)
    assert words in str(caught.value) and '\n' not in str(caught.value)


@every_loss
def test_a_value_that_is_no_class_is_refused(name, classes):
    """Masks are checked when they are read. This holds for masks from elsewhere."""
    logits, mask = scene(classes)
    for value in (-1, 3, 255):
        mask[0, 0, 0] = value
        with pytest.raises(RuntimeError, match='is no class'):
            build_loss(name, classes)(logits, mask)
