"""The simulated cell assay: fluorescence-like cells whose every phenotype is known.

Real screens have no ground truth, so an explanation cannot be scored on them.  Here a cell is drawn from explicit
*factors* ``u_f`` (standard normal in the untreated population), and a treatment at dose ``D`` moves some of them:

    u_f = well_f + plate_f + potency_well * D * shift_f(treatment) + N(0, 1)          (cell by cell)
    physical_f = link_f(u_f)                                                           (radius, strength, count, ...)

The factors that a treatment moves are *planted*, all the others are *decoys*.  Position, rotation, outline, neighbours,
focus, illumination, background, gain and noise are *nuisances*: drawn from the same distribution in every class, so no
factor and no class can be read from anything but the pixels that the factor draws.

A scene is defined on the square [-1, 1]^2, so one seed gives the same cells at every image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffex.errors import UserError

Array = NDArray[np.float32]

CHANNELS = ("DNA", "tubulin", "actin", "Golgi", "mitochondria")
DEFAULT_CHANNELS = ("DNA", "tubulin", "actin")
CONTROL = "DMSO"
SIZES = (32, 128)
CHUNK = 32  # images drawn at a time: at 32 px one float32 plane of a chunk fits the second-level cache


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One property of a cell: ``base * exp(scale * u)`` (or a threshold on u), the channels that show it, its words."""

    base: float
    scale: float
    channels: tuple[str, ...]
    rises: str
    falls: str
    threshold: float | None = None

    def physical(self, u: Array) -> Array:
        """Turn the standard score u, any shape, into the quantity that the renderer draws, same shape."""
        if self.threshold is not None:
            return (1.0 + (u > self.threshold)).astype(np.float32)
        return (self.base * np.exp(self.scale * np.clip(u, -4.0, 4.0))).astype(np.float32)


_CELL = ("tubulin", "actin", "Golgi", "mitochondria")  # the Golgi lies where the cell leaves it room
_NUCLEUS = ("DNA", "tubulin", "mitochondria")  # in the latter two it is a hole
FACTORS: dict[str, Factor] = {
    "nucleus_area": Factor(
        base=0.175, scale=0.22, channels=_NUCLEUS, rises="the nucleus grows", falls="the nucleus shrinks"
    ),
    "nucleus_count": Factor(
        base=1.0,
        scale=1.0,
        threshold=1.1,
        channels=_NUCLEUS,
        rises="one nucleus becomes two",
        falls="two nuclei become one",
    ),
    "chromatin_texture": Factor(
        base=0.18,
        scale=0.45,
        channels=("DNA",),
        rises="the chromatin grows grainier",
        falls="the chromatin smooths out",
    ),
    "cytoplasm_area": Factor(base=0.62, scale=0.20, channels=_CELL, rises="the cell spreads", falls="the cell shrinks"),
    "cell_elongation": Factor(
        base=1.22, scale=0.16, channels=_CELL, rises="the cell stretches", falls="the cell rounds up"
    ),
    "microtubule_density": Factor(
        base=0.34, scale=0.32, channels=("tubulin",), rises="microtubules thicken", falls="microtubules thin out"
    ),
    "actin_rim": Factor(
        base=0.38, scale=0.38, channels=("actin",), rises="the actin rim brightens", falls="the actin rim fades"
    ),
    "actin_fibres": Factor(
        base=0.16, scale=0.45, channels=("actin",), rises="stress fibres appear", falls="stress fibres vanish"
    ),
    "golgi_dispersion": Factor(
        base=0.13, scale=0.35, channels=("Golgi",), rises="the Golgi scatters", falls="the Golgi gathers"
    ),
    "mitochondria_mass": Factor(
        base=0.40, scale=0.32, channels=("mitochondria",), rises="mitochondria multiply", falls="mitochondria dwindle"
    ),
}
NUISANCES = (
    "position", "rotation", "outline", "neighbours", "focus", "illumination", "background", "gain", "noise",
    "well_effect", "plate_effect",
)  # fmt: skip


DESIGNS: dict[str, dict[str, dict[str, float]]] = {
    "binary": {
        "compound": {
            "actin_rim": -3.4, "cytoplasm_area": -2.8, "microtubule_density": 3.0, "nucleus_area": 3.0,
        },
    },
    "multiclass": {
        "actin inhibitor": {"actin_rim": -2.0, "actin_fibres": -1.2},
        "cytokinesis inhibitor": {"nucleus_count": 2.2, "nucleus_area": 0.8},
        "microtubule stabilizer": {"microtubule_density": 1.8, "cytoplasm_area": -1.2},
    },
    "golgi": {"secretion inhibitor": {"golgi_dispersion": 2.0, "nucleus_area": -1.0}},
    "null": {"inert compound": {}},
}  # fmt: skip
"""Named sets of treatments: class name -> factor -> shift in standard deviations at dose 1.  The control is implied."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides a screen's pixels, one entry per cell, before a single pixel is drawn.

    Attributes:
        channels: names of the C channels to draw, in order.
        class_names: sorted class names; ``labels`` index into them.
        labels: (N,) int64.
        metadata: ``Metadata_*`` columns, each of length N.
        scores: (N, F) float32, the standard score u of every factor in ``FACTORS`` order.
        nuisance: nuisance parameters, each (N, ...) float32.
        seed: seed of the pixel noise.
    """

    channels: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    metadata: dict[str, NDArray]
    scores: Array
    nuisance: dict[str, Array]
    seed: int

    def __len__(self) -> int:
        return len(self.labels)

    def physical(self) -> Array:
        """Factor values as drawn (areas, strengths, counts), (N, F) float32 in ``FACTORS`` order."""
        return np.stack([f.physical(self.scores[:, i]) for i, f in enumerate(FACTORS.values())], axis=1)

    def visible_scores(self) -> Array:
        """What pixels can show of the factors, (N, F) float32: the score u, or the count where u has a threshold."""
        columns = [
            self.scores[:, i] if f.threshold is None else f.physical(self.scores[:, i])
            for i, f in enumerate(FACTORS.values())
        ]
        return np.stack(columns, axis=1).astype(np.float32)


def visible_factors(channels: Sequence[str]) -> tuple[str, ...]:
    """Names of the factors that at least one of the channels shows."""
    return tuple(name for name, factor in FACTORS.items() if set(factor.channels) & set(channels))


def planted_factors(treatments: Mapping[str, Mapping[str, float]], channels: Sequence[str]) -> tuple[str, ...]:
    """Names of the factors that some treatment moves and some channel shows; all other visible ones are decoys."""
    moved = {name for shifts in treatments.values() for name, shift in shifts.items() if shift != 0}
    return tuple(name for name in visible_factors(channels) if name in moved)


def plan(
    *,
    treatments: Mapping[str, Mapping[str, float]],
    channels: Sequence[str] = DEFAULT_CHANNELS,
    num_images: int = 4096,
    num_plates: int = 4,
    wells_per_class: int = 6,
    doses: Sequence[float] = (1.0,),
    well_sd: float = 0.15,
    plate_sd: float = 0.10,
    seed: int = 0,
) -> Plan:
    """Lay out a screen: which cell lies in which well of which plate, and every parameter that draws it.

    Args:
        treatments: class name -> {factor: shift in standard deviations at dose 1}; the control class is added.
        channels: 1 to 5 of ``CHANNELS``.
        num_images: number of cells N, spread evenly over all wells.
        num_plates: plates; every plate holds wells of every class.
        wells_per_class: wells of each class on each plate.
        doses: doses a treatment is given at, in turn over its wells; multiplies the shifts.
        well_sd: standard deviation of each well's own offset of every factor, and of its log potency.
        plate_sd: the same for plates, and the standard deviation of a plate's log gain in each channel.
        seed: equal seeds give bit-identical screens.

    Returns:
        The plan of N cells.

    Raises:
        UserError: an unknown channel, factor or class name, or a number out of range.
    """
    _check(treatments, channels, num_images, num_plates, wells_per_class, doses)
    rng = np.random.default_rng(seed)
    class_names = tuple(sorted({CONTROL, *treatments}))
    names = list(FACTORS)
    shift = np.zeros((len(class_names), len(names)), np.float32)
    for name, shifts in treatments.items():
        for factor, value in shifts.items():
            shift[class_names.index(name), names.index(factor)] = value

    # One row per well: class, plate, dose; then its random effects.
    classes, plates = len(class_names), num_plates
    well_class = np.tile(np.repeat(np.arange(classes), wells_per_class), plates)
    well_plate = np.repeat(np.arange(plates), classes * wells_per_class)
    turn = np.tile(np.arange(wells_per_class), classes * plates) + well_plate
    control = np.array([name == CONTROL for name in class_names])
    well_dose = np.where(control[well_class], 0.0, np.asarray(doses, np.float64)[turn % len(doses)])
    position = np.concatenate([rng.permutation(classes * wells_per_class) for _ in range(plates)])
    potency = np.exp(well_sd * rng.standard_normal(len(well_class)))
    well_offset = well_sd * rng.standard_normal((len(well_class), len(names)))
    plate_offset = plate_sd * rng.standard_normal((plates, len(names)))
    plate_gain = np.exp(plate_sd * rng.standard_normal((plates, len(CHANNELS))))
    centre = (well_dose * potency)[:, None] * shift[well_class] + well_offset + plate_offset[well_plate]

    well = np.sort(np.arange(num_images) % len(well_class))
    labels = well_class[well].astype(np.int64)
    scores = (centre[well] + rng.standard_normal((num_images, len(names)))).astype(np.float32)
    metadata = {
        "Metadata_Plate": np.array([f"P{p + 1}" for p in well_plate])[well],
        "Metadata_Well": np.array([f"{chr(65 + k // 12)}{k % 12 + 1:02d}" for k in position])[well],
        "Metadata_Compound": np.array(class_names)[labels],
        "Metadata_Dose": well_dose[well].astype(np.float32),
    }
    nuisance = _draw_nuisance(rng, num_images)
    nuisance["gain"] = (nuisance["gain"] * plate_gain[well_plate[well]]).astype(np.float32)
    return Plan(
        channels=tuple(channels), class_names=class_names, labels=labels, metadata=metadata, scores=scores,
        nuisance=nuisance, seed=seed,
    )  # fmt: skip


def _check(
    treatments: Mapping[str, Mapping[str, float]], channels: Sequence[str], num_images: int, num_plates: int,
    wells_per_class: int, doses: Sequence[float],
) -> None:  # fmt: skip
    for channel in channels:
        if channel not in CHANNELS:
            raise UserError(f"assay channel {channel!r} is not one of {', '.join(CHANNELS)} (data.channels)")
    if not 1 <= len(set(channels)) == len(channels):
        raise UserError(
            f"the assay needs 1 to {len(CHANNELS)} different channels, got {list(channels)} (data.channels)"
        )
    if not treatments or CONTROL in treatments:
        raise UserError(f"assay.treatments needs at least one class, and none called {CONTROL!r}: it is the control")
    for name, shifts in treatments.items():
        for factor in shifts:
            if factor not in FACTORS:
                raise UserError(
                    f"treatment {name!r} moves {factor!r}, which is not one of {', '.join(FACTORS)} (assay.treatments)"
                )
    if min(num_plates, wells_per_class) < 1 or not doses or min(doses) < 0:
        raise UserError("the assay needs num_plates >= 1, wells_per_class >= 1 and doses >= 0")
    wells = num_plates * wells_per_class * (len(treatments) + 1)
    if num_images < wells:
        raise UserError(f"assay.num_images = {num_images} leaves some of the {wells} wells empty; raise it")


def _draw_nuisance(rng: np.random.Generator, n: int) -> dict[str, Array]:
    """Nuisance parameters of n cells: independent of class and factors."""

    def u(low: float, high: float, *shape: int) -> NDArray[np.float64]:
        return rng.uniform(low, high, (n, *shape))

    rotation = u(0, 2 * np.pi)
    draws = {
        "position": 0.03 * rng.standard_normal((n, 2)),  # crops are centred on the nucleus, not quite
        "rotation": rotation,
        "outline": np.concatenate([u(-1, 1, 4) * [0.02, 0.02, 0.07, 0.07]], axis=1),
        # Offset of the cell from its nucleus; where a second nucleus lies (along the cell, roughly); tilt; elongation.
        "nucleus": np.concatenate(
            [
                u(-0.06, 0.06, 2),
                (rotation + 0.3 * rng.standard_normal(n))[:, None],
                u(0, np.pi, 1),
                u(1.0, 1.25, 1),
            ],
            axis=1,
        ),
        "neighbour_angle": np.stack([u(0, 2 * np.pi), u(0, 2 * np.pi)], axis=1),
        "neighbour_distance": u(1.22, 1.75, 2),
        "focus": u(0.0, 1.0) ** 2 * 0.07,
        "illumination": np.stack([u(0, 2 * np.pi), u(0.0, 0.15)], axis=1),
        "background": u(0.015, 0.05),
        "gain": np.exp(0.08 * rng.standard_normal((n, len(CHANNELS)))),
        "texture": rng.integers(0, 1 << 30, (n, 4)),
        "golgi": np.concatenate([u(0, 2 * np.pi, 1), rng.standard_normal((n, 14)), u(0.6, 1.2, 7)], axis=1),
    }
    return {name: np.ascontiguousarray(x, np.int64 if name == "texture" else np.float32) for name, x in draws.items()}


def draw(plan: Plan, size: int, indices: Sequence[int] | None = None) -> Iterator[NDArray[np.uint8]]:
    """Draw the planned cells.

    Args:
        plan: what to draw.
        size: side of the images in pixels, 32 to 128.
        indices: which cells (default: all, in order).  A cell's pixels do not depend on which others are drawn.

    Yields:
        Arrays (b, C, size, size) uint8 of up to ``CHUNK`` cells, in the order of ``indices``.

    Raises:
        UserError: size out of range.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"the assay draws images of {SIZES[0]} to {SIZES[1]} pixels, got {size} (data.size)")
    order = np.arange(len(plan)) if indices is None else np.asarray(indices, np.int64)
    for start in range(0, len(order), CHUNK):
        yield _draw_chunk(plan, size, order[start : start + CHUNK])


# ----------------------------------------------------------------------------------------------------------------------
# The renderer.  Planes are (b, size, size) float32; parameters are (b, 1, 1).


@lru_cache(maxsize=4)
def _textures(size: int, side: int) -> dict[str, Array]:
    """Band-limited periodic noise, 16 tiles a kind, each 2 scenes wide, mean 0, standard deviation 1."""
    end = 2 * size + side
    rng = np.random.default_rng(20250209)
    period = 2 * size
    fy, fx = np.meshgrid(np.fft.fftfreq(period) * period, np.fft.rfftfreq(period) * period, indexing="ij")
    radius = np.hypot(fx, fy)  # cycles per tile, so the scene keeps its grain at every image size
    bank = {}
    for name, cycles in {"fine": 15.0, "coarse": 7.0, "broad": 2.5}.items():
        band = np.exp(-(((radius - cycles) / (0.5 * cycles)) ** 2))
        tile = np.fft.irfft2(band * np.exp(2j * np.pi * rng.uniform(size=(16, *radius.shape))), s=(period, period))
        tile = tile / tile.std(axis=(1, 2), keepdims=True)
        bank[name] = np.concatenate([np.concatenate([tile, tile], 1)] * 2, 2)[:, :end, :end].astype(np.float32)
    return bank


def _texture(kind: str, code: NDArray[np.int64], size: int, side: int) -> Array:
    """Cut one (side, side) window per code (b,) out of the tiles: tile number and offsets are digits of the code."""
    tiles = _textures(size, side)[kind]
    windows = np.lib.stride_tricks.sliding_window_view(tiles, (side, side), axis=(1, 2))
    scale = np.float64(2 * size) / 4096  # offsets in scenes, not pixels: the same scene at every size
    oy, ox = (code // 16 % 4096 * scale).astype(np.int64), (code // 65536 % 4096 * scale).astype(np.int64)
    return windows[code % 16, oy, ox]


def _edge(distance: Array, softness: Array) -> Array:
    """Soft step from 0 (outside, distance < 0) to 1 (inside), as wide as one pixel plus the blur."""
    t = np.clip(distance / softness + 0.5, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _bump(q: Array) -> Array:
    """A bell, 1 at q = 0: 1 / (1 + q^2)^2."""
    return np.square(1.0 / (1.0 + q * q))


def _column(x: NDArray) -> Array:
    """One number a cell, or several, shaped to broadcast over its pixels."""
    return np.asarray(x, np.float32)[..., None, None]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Cells as they are, before light, gain, background and noise.

    Attributes:
        planes: (b, C, side, side) float32, about 0 to 1.
        radius: (b, side, side) distance from the cell's centre, 1 on its outline.
        body: (b, side, side) 1 inside the cell, 0 outside.
        nuclei: two of (b, side, side), 1 inside the first and second nucleus; twice the same where there is one.
    """

    planes: Array
    radius: Array
    body: Array
    nuclei: tuple[Array, Array]


def scene(plan: Plan, size: int, index: NDArray[np.int64], *, side: int | None = None, alone: bool = False) -> Scene:
    """Draw cells ``index`` (b,), size pixels to 2 units, on ``side`` (default: size, at most twice that) pixels.

    ``alone`` leaves out the neighbours that reach in from the border.
    """
    side = side or size
    value = {name: _column(f.physical(plan.scores[index, i])) for i, (name, f) in enumerate(FACTORS.items())}
    n: dict[str, NDArray] = {name: x[index] for name, x in plan.nuisance.items()}
    at = ((np.arange(side, dtype=np.float32) + 0.5) * (2.0 / size) - side / size).astype(np.float32)
    gx, gy = at[None, None, :], at[None, :, None]
    soft = _column(2.2 / size + n["focus"])
    sharp = _column(1.0 / (1.0 + 60.0 * n["focus"] ** 1.5))  # out of focus, fine structure fades

    # The cell: an ellipse with a wavy outline.  r = 1 on its edge.
    px, py = gx - _column(n["position"][:, 0]), gy - _column(n["position"][:, 1])
    dx, dy = px + _column(n["nucleus"][:, 0]), py + _column(n["nucleus"][:, 1])
    cos, sin = _column(np.cos(n["rotation"])), _column(np.sin(n["rotation"]))
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    cell = np.sqrt(value["cytoplasm_area"])
    stretch = np.sqrt(value["cell_elongation"])
    ex, ey = x / (cell * stretch), y / (cell / stretch)
    rho = np.sqrt(ex * ex + ey * ey) + 1e-4
    c, s = ex / rho, ey / rho
    c2, s2 = c * c - s * s, 2.0 * c * s
    c3, s3 = c * c2 - s * s2, s * c2 + c * s2
    w = [_column(n["outline"][:, k]) for k in range(4)]
    r = rho * (1.0 + w[0] * c2 + w[1] * s2 + w[2] * c3 + w[3] * s3)
    body = _edge((1.0 - r) * cell, soft)

    # Two neighbours reach in from the border; the cell lies above them.
    beside, beside_nucleus = np.zeros_like(body), np.zeros_like(body)
    for k in range(0 if alone else 2):
        angle, distance = n["neighbour_angle"][:, k], n["neighbour_distance"][:, k]
        nx, ny = gx - _column(distance * np.cos(angle)), gy - _column(distance * np.sin(angle))
        away = np.sqrt(nx * nx + ny * ny)
        beside = np.maximum(beside, _edge(0.72 - away, soft))
        beside_nucleus = np.maximum(beside_nucleus, _edge(0.33 - away, soft))
    beside, beside_nucleus = beside * (1.0 - body), beside_nucleus * (1.0 - body)

    # One nucleus, or two smaller ones side by side.
    two = value["nucleus_count"] > 1.5
    radius = np.sqrt(value["nucleus_area"]) * np.where(two, np.float32(0.78), np.float32(1.0))
    apart = np.where(two, radius * np.float32(0.98), np.float32(0.0))
    ox, oy = apart * _column(np.cos(n["nucleus"][:, 2])), apart * _column(np.sin(n["nucleus"][:, 2]))
    tilt, long = n["nucleus"][:, 3], _column(np.sqrt(n["nucleus"][:, 4]))
    tc, ts = _column(np.cos(tilt)), _column(np.sin(tilt))
    nuclei = []
    for sign in (-1.0, 1.0):
        qx, qy = px + sign * ox, py + sign * oy
        u, v = (qx * tc + qy * ts) / long, (qy * tc - qx * ts) * long
        nuclei.append(_edge(radius - np.sqrt(u * u + v * v), soft) * body)
    nucleus = np.maximum(nuclei[0], nuclei[1])

    planes = []
    for channel in plan.channels:
        if channel == "DNA":
            grain = _texture("coarse", n["texture"][:, 0], size, side) * (value["chromatin_texture"] * sharp)
            plane = nucleus * (0.66 + 0.6 * grain) + 0.58 * beside_nucleus
        elif channel == "tubulin":
            ridge = 1.0 - np.abs(_texture("fine", n["texture"][:, 1], size, side)) * (0.34 * sharp)
            near = 0.50 + 0.85 * _bump((r - 0.30) * 1.3)
            plane = body * (0.08 + value["microtubule_density"] * near * ridge * (1.0 - 0.45 * nucleus))
            plane += beside * (0.08 + 0.30 * ridge)
        elif channel == "actin":
            uneven = _texture("broad", n["texture"][:, 2], size, side)
            rim = _bump((r - 0.93) * cell / (0.055 + soft)) * (1.0 + 0.22 * uneven)
            stripes = np.square(np.maximum(0.0, np.sin(15.0 * y + 1.3 * uneven)))
            plane = body * (0.13 + value["actin_fibres"] * sharp * stripes * (1.3 - r)) + value["actin_rim"] * rim
            plane += beside * (0.16 + 0.05 * uneven)
        elif channel == "Golgi":
            plane = 0.05 * (body + beside)
            spread = value["golgi_dispersion"]
            g = n["golgi"]
            hx, hy = _column(0.40 * np.cos(g[:, 0])), _column(0.40 * np.sin(g[:, 0]))
            for k in range(7):
                sx = px - hx - spread * _column(g[:, 1 + k])
                sy = py - hy - spread * _column(g[:, 8 + k])
                plane = plane + 0.55 * _bump((sx * sx + sy * sy) / (0.055 + soft) ** 2) * _column(g[:, 15 + k])
            plane = plane * np.maximum(body, 0.25)
        else:  # mitochondria
            threads = np.maximum(0.0, 0.5 + 0.8 * _texture("fine", n["texture"][:, 3], size, side) * sharp)
            ring = _bump((r - 0.55) * 2.2) * (1.0 - 0.85 * nucleus)
            plane = body * (0.06 + value["mitochondria_mass"] * ring * threads) + beside * (0.06 + 0.15 * threads)
        planes.append(plane)
    return Scene(planes=np.stack(planes, axis=1), radius=r, body=body, nuclei=(nuclei[0], nuclei[1]))


def _draw_chunk(plan: Plan, size: int, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Draw cells ``index`` (b,) as their camera sees them: (b, C, size, size)."""
    image = scene(plan, size, index).planes
    n: dict[str, NDArray] = {name: plan.nuisance[name][index] for name in ("illumination", "gain", "background")}
    at = ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)
    gx, gy = at[None, None, :], at[None, :, None]
    which = [CHANNELS.index(channel) for channel in plan.channels]
    alpha, slope = n["illumination"][:, 0], n["illumination"][:, 1]
    light = 1.0 + _column(slope * np.cos(alpha)) * gx + _column(slope * np.sin(alpha)) * gy
    image *= light[:, None] * _column(n["gain"][:, which])
    image += _column(n["background"])[:, None]
    # Shot and camera noise, from a generator of the cell's own: pixels do not depend on what else is drawn.
    for k, cell_index in enumerate(index):
        rng = np.random.Generator(np.random.SFC64([plan.seed, int(cell_index)]))
        noise = rng.standard_normal(image.shape[1:], np.float32)
        image[k] += noise * np.sqrt(1.5e-4 + 4e-4 * np.maximum(image[k], 0.0))
    return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
