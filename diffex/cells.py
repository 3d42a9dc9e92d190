"""Nuclei and cells of an image, found by classical means.

    nuclei     smoothed DNA > half of its neighbourhood's brightness, split at the necks of the distance transform
    cells      everything brighter than half of the cell bodies, shared out from the nuclei by a watershed

All lengths are in pixels of the given image, all areas in square pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse import csgraph
from skimage import filters, measure, morphology, segmentation, transform

from diffex.errors import UserError, did_you_mean

Plane = NDArray[np.float32]
Labels = NDArray[np.int32]
Mask = NDArray[np.bool_]

NUCLEUS_NAMES = ("DNA", "DAPI", "Hoechst", "nuclei", "nucleus", "nuclear", "H2B")
"""What a channel that shows nuclei is called: one of these words, in any case, perhaps after ``Orig``."""

EDGE = 0.5  # a nucleus ends at this share of its own brightness, a blurred disc's true edge
BODY = 0.5  # and a cell at this share of the bodies' typical brightness, for cells thin out towards their edge
NOISE = 6.0  # nothing is an object that does not stand out by so many standard deviations of the smoothed background
MOST_NUCLEI = 4  # of one cell; more are a clump without visible borders
SPECK = 0.25  # objects below this share of a nucleus in width are specks, dropped without a word


def find_channel(channels: Sequence[str], name: str | None, words: Sequence[str] = ()) -> int | None:
    """Position of the channel called ``name``, else of the first whose name holds one of the words, else None.

    Raises:
        UserError: there is no channel ``name``.
    """
    if name is not None:
        if name not in channels:
            raise UserError(f"there is no channel {name!r}: {did_you_mean(name, channels)}")
        return list(channels).index(name)
    pattern = re.compile(rf"(?:^|[^a-z]|orig)(?:{'|'.join(words).lower()})(?![a-z])")
    return next((i for i, c in enumerate(channels) if words and pattern.search(c.lower())), None)


# ----------------------------------------------------------------------------------------------------------------------
# Nuclei


def nucleus_diameter(plane: NDArray) -> float:
    """Typical diameter of the nuclei in an image, in pixels: the median of their equivalent diameters.

    Args:
        plane: (H, W) image of nuclei, bright on dark, any unit.

    Returns:
        The diameter; NaN where there is no nucleus.
    """
    mask = _bright(ndimage.gaussian_filter(np.asarray(plane, np.float32), 1.0))[1]
    parts, count = ndimage.label(ndimage.binary_opening(mask))
    if not count:
        return float("nan")
    # Inscribed circles, which touching nuclei do not widen, each counted by its area, which drowns specks.
    radius = np.sort(ndimage.maximum(depth_inside(mask), parts, np.arange(1, count + 1)))
    share = np.cumsum(radius**2)
    guess = 2.0 * float(radius[np.searchsorted(share, share[-1] / 2)])
    area = np.bincount(segment_nuclei(plane, max(guess, 3.0)).ravel())[1:]
    return float(2.0 * np.sqrt(np.median(area) / np.pi)) if area.size else float("nan")


def segment_nuclei(plane: NDArray, diameter: float | None = None) -> Labels:
    """Find the nuclei of an image.

    Each nucleus ends at half of its own brightness above the background, so dim and bright ones are measured alike;
    those that touch are split where the distance transform has a neck.

    Args:
        plane: (H, W) image of nuclei, bright on dark, any unit, uneven background allowed.
        diameter: typical diameter in pixels; None: measured by ``nucleus_diameter``.

    Returns:
        (H, W) labels: 0 background, 1 to n nuclei in raster order; all 0 where there is none.
    """
    plane = np.asarray(plane, np.float32)
    if diameter is None:
        diameter = nucleus_diameter(plane)
        if not np.isfinite(diameter):
            return np.zeros(plane.shape, np.int32)
    smooth = ndimage.gaussian_filter(plane, max(0.7, diameter / 25))
    light, mask = _bright(smooth - slow_background(smooth, 5 * diameter))
    if not mask.any():
        return np.zeros(plane.shape, np.int32)
    # Half of the brightness around: first of the neighbourhood, to part what touches; then of each nucleus.
    bright = np.minimum(light, 2.0 * np.median(light[mask])) * mask
    size = max(3, round(diameter))
    level = ndimage.uniform_filter(bright, size) / np.maximum(
        ndimage.uniform_filter(mask.astype(np.float32), size), 1e-6
    )
    mask &= light > EDGE * level
    mask = ndimage.binary_opening(mask, morphology.disk(max(1, round(diameter / 12))))
    labels = _split(morphology.remove_small_holes(mask, max_size=round((0.5 * diameter) ** 2)), diameter)
    level = np.asarray(ndimage.median(light, labels, np.arange(labels.max() + 1)))
    return _whole(np.where(light > EDGE * level[labels], labels, 0), (SPECK * diameter) ** 2)


def _bright(image: Plane) -> tuple[Plane, Mask]:
    """The image above its background level, and where it is an object: Otsu's threshold, but never within the noise."""
    sample = image.ravel()[:: max(1, image.size // 200_000)]
    dark = sample[sample <= filters.threshold_otsu(np.minimum(sample, np.percentile(sample, 99.5)))]
    # The background is the mode of the darker pixels, its noise what lies below the mode: objects only lie above.
    low = float(np.percentile(dark, 0.1))
    span = max(float(dark.max()) - low, 1e-3 * abs(low) + 1e-9)
    counts, edges = np.histogram(dark, 128, (low, low + span))
    mode = float(edges[ndimage.gaussian_filter1d(counts.astype(np.float64), 2.0).argmax()] + (edges[1] - edges[0]) / 2)
    below = dark[dark < mode]
    noise = float(np.sqrt(np.mean((mode - below) ** 2))) if below.size else 0.0
    noise = max(noise, 1e-3 * float(sample.max() - mode), 1e-12)
    # On a logarithmic scale bright debris does not draw the threshold up to itself.
    cut = 4.0 * noise * np.sinh(filters.threshold_otsu(np.arcsinh((sample - mode) / (4.0 * noise))))
    light = image - np.float32(mode)
    return light, light > max(float(cut), NOISE * noise)


def slow_background(plane: Plane, width: float) -> Plane | float:
    """Background that varies more slowly than over ``width`` pixels: a grey opening of the coarse image.

    Returns:
        (H, W) background; 0 where the image is narrower than twice the width.
    """
    step = max(1, round(width / 20))
    if min(plane.shape) < 2 * width:
        return 0.0
    coarse = ndimage.uniform_filter(plane, step)[step // 2 :: step, step // 2 :: step]
    window = round(width / step)
    opened = ndimage.gaussian_filter(ndimage.grey_opening(coarse, window), window / 4)
    return np.asarray(transform.resize(opened, plane.shape, order=1), np.float32)


def depth_inside(mask: Mask) -> Plane:
    """Distance to the nearest pixel outside the mask; what the image's border cuts off counts as inside."""
    padded = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))
    return np.asarray(padded[1:-1, 1:-1], np.float32)


def _split(mask: Mask, diameter: float) -> Labels:
    """Part touching round objects: a watershed from the maxima of the distance transform that necks separate."""
    step = max(1, round(diameter / 20))  # the transform is smooth: large nuclei need no full resolution
    depth = ndimage.gaussian_filter(depth_inside(mask[::step, ::step]) * step, 0.06 * diameter / step)
    peaks, _ = ndimage.label(morphology.h_maxima(depth, 0.03 * diameter), np.ones((3, 3)))
    seeds = np.zeros(mask.shape, np.int32)
    seeds[::step, ::step] = peaks
    depth = transform.resize(depth, mask.shape, order=1) if step > 1 else depth
    return np.asarray(segmentation.watershed(-depth, seeds, mask=mask), np.int32)


def _whole(labels: NDArray, least: float) -> Labels:
    """Keep the largest connected piece of each label if it has the least area, fill it, and number them anew."""
    pieces, count = measure.label(labels, connectivity=1, return_num=True)
    area = np.bincount(pieces.ravel(), minlength=count + 1)
    owner = np.zeros(count + 1, np.int64)
    owner[pieces.ravel()] = labels.ravel()
    largest = np.zeros(int(labels.max()) + 1, np.int64)
    order = np.argsort(area, kind="stable")
    largest[owner[order]] = order
    kept = np.sort([k for k in largest[1:] if k and area[k] >= least]).astype(np.int64)
    number = np.zeros(count + 1, np.int32)
    number[kept] = np.arange(1, len(kept) + 1)
    whole = number[pieces]
    holes = morphology.remove_small_holes(whole > 0, max_size=max(1, round(4 * least))) & (whole == 0)
    return segmentation.expand_labels(whole, int(np.sqrt(least)) + 1) * holes + whole if holes.any() else whole


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def cell_plane(image: NDArray, nuclear: int | None, cell: int | None = None, background: float | None = None) -> Plane:
    """The image to find cell bodies in: one channel, or the mean of all but the nuclei's, each from 0 to 1.

    Args:
        image: (C, H, W), any unit.
        nuclear: position of the nuclei's channel, None where there is none.
        cell: position of the channel to use; None: all but the nuclei's, averaged (the nuclei's where it is alone).
        background: level outside cells; None: each channel's first percentile, right where a gap is in the image.

    Returns:
        (H, W) plane from 0 (background) to 1.
    """
    chosen = [cell] if cell is not None else [i for i in range(len(image)) if i != nuclear] or [0]
    planes = []
    for plane in image[chosen].astype(np.float32):
        low, high = np.percentile(plane, (1.0, 99.0)).astype(np.float32)
        low = low if background is None else np.float32(background)
        planes.append(np.clip((plane - low) / max(high - low, np.float32(1e-9)), 0.0, 1.0))
    return np.mean(planes, axis=0, dtype=np.float32)


def segment_cells(plane: NDArray, nuclei: Labels) -> Labels:
    """Give each nucleus its cell: bodies brighter than the background, shared out from the nuclei by a watershed.

    Args:
        plane: (H, W) image of the cell bodies with the background at 0, e.g. of ``cell_plane``.
        nuclei: (H, W) labels of ``segment_nuclei``; nuclei of one cell may share a number.

    Returns:
        (H, W) labels of the cells under their nuclei's numbers; neighbours whose nuclei lie outside are left out.
    """
    if not nuclei.any():
        return np.zeros(nuclei.shape, np.int32)
    seeded = nuclei > 0
    inner = depth_inside(seeded)
    width = 2.0 * float(inner.max())
    smooth = ndimage.gaussian_filter(np.asarray(plane, np.float32), max(0.5, width / 40))
    typical = float(np.median(smooth[ndimage.distance_transform_edt(~seeded) < 0.15 * width]))
    body = ndimage.binary_fill_holes(seeded | (smooth > BODY * typical))
    # Wider than a nucleus is wide enough: in a sheet of cells depth says nothing.
    depth = np.minimum(ndimage.gaussian_filter(depth_inside(body), 0.05 * width), 0.7 * width)
    # A body that has a middle of its own but no nucleus is a neighbour reaching in: it competes, then goes.
    middles, _ = ndimage.label(morphology.h_maxima(depth, 0.03 * width), np.ones((3, 3)))
    basins = segmentation.watershed(-depth, middles, mask=body)
    orphans = np.setdiff1d(np.arange(1, middles.max() + 1), basins[inner > 0.2 * width])
    last = int(nuclei.max())
    seeds = np.where(np.isin(middles, orphans) & ~seeded, middles + last, nuclei)
    # Flooded in order of distance from the seeds, later where the body is narrow.
    around = ndimage.distance_transform_edt(seeds == 0)
    labels = segmentation.watershed(around - 4.0 * depth, seeds, mask=body)
    return np.where(labels <= last, labels, 0).astype(np.int32)


def shared_cells(image: NDArray, nuclear: int | None, nuclei: Labels) -> Labels:
    """Give nuclei of one cell one number: neighbours between which no channel of the cell shows a border.

    Two nuclei that lie side by side belong to one cell where, along the line between their centres, some channel of the
    cell goes on between them as inside them, and the mean of all shows no gap (cells' edges) and no ridge (membranes).

    Args:
        image: (C, H, W), background near 0.
        nuclear: position of the nuclei's channel.
        nuclei: (H, W) labels of ``segment_nuclei``.

    Returns:
        (H, W) labels 1 to m <= n of the nuclei's cells; unchanged where there is no other channel.
    """
    count, others = int(nuclei.max()), [plane for i, plane in enumerate(image) if i != nuclear]
    if count < 2 or not others:
        return nuclei
    index = np.arange(1, count + 1)
    area = np.bincount(nuclei.ravel())[1:]
    width = 2.0 * float(np.sqrt(np.median(area) / np.pi))
    others = [cell_plane(image, nuclear, background=0.0), *others]
    planes = np.stack([ndimage.gaussian_filter(p, max(0.7, width / 25), output=np.float32) for p in others])
    centre = np.array(ndimage.center_of_mass(nuclei > 0, nuclei, index))
    pairs = [
        (i, j)
        for i, j in _adjacent(nuclei, 0.15 * width)
        if min(area[i], area[j]) > 0.3 * max(area[i], area[j]) and _continuous(planes, centre[i], centre[j], width)
    ]
    graph = sparse.coo_matrix((np.ones(len(pairs)), np.array(pairs, np.int64).reshape(-1, 2).T), (count, count))
    group = csgraph.connected_components(graph, directed=False)[1]
    group = np.where(np.bincount(group)[group] > MOST_NUCLEI, count + index, group)
    return np.concatenate([[0], np.unique(group, return_inverse=True)[1] + 1]).astype(np.int32)[nuclei]


def _adjacent(nuclei: Labels, gap: float) -> list[tuple[int, int]]:
    """Pairs (from 0) of nuclei that come nearer to each other than twice the gap."""
    distance, (y, x) = ndimage.distance_transform_edt(nuclei == 0, return_indices=True)
    nearest = np.where(distance <= gap, nuclei[y, x], 0)
    pairs: set[tuple[int, int]] = set()
    for a, b in ((nearest[:, 1:], nearest[:, :-1]), (nearest[1:], nearest[:-1])):
        meet = (a != b) & (a > 0) & (b > 0)
        pairs |= {(min(i, j) - 1, max(i, j) - 1) for i, j in zip(a[meet].tolist(), b[meet].tolist(), strict=True)}
    return sorted(pairs)


def _continuous(planes: Plane, first: NDArray, second: NDArray, width: float) -> bool:
    """Whether the planes, the mean first, go on between two nuclei as they are inside them: see ``shared_cells``."""
    length = float(np.hypot(*(second - first)))
    along = (second - first) / length
    across = np.array([-along[1], along[0]])
    s, q = np.arange(-length / 2, length / 2 + 0.5), np.linspace(-width / 4, width / 4, 9)
    middle = ((first + second) / 2)[:, None, None]
    at = middle + along[:, None, None] * s[None, :, None] + across[:, None, None] * q
    between = np.abs(s) <= max(1.5, 0.08 * width)
    profile = np.stack([ndimage.map_coordinates(p, at, order=1, mode="nearest").mean(axis=1) for p in planes])
    inside = np.maximum(profile[:, ~between].mean(axis=1), 1e-9)
    ridge, gap = profile[:, between].max(axis=1) / inside, profile[:, between].min(axis=1) / inside
    return bool(ridge[0] < 1.3 and gap[0] > 0.8 and ((ridge[1:] < 1.12) & (gap[1:] > 0.85)).any())


def central_cell(
    image: Plane, nuclear: int | None, cell: int | None = None, background: float | None = None
) -> tuple[Mask, Mask, int]:
    """Find the cell in the middle of a single-cell image.

    Args:
        image: (C, H, W).
        nuclear, cell, background: as of ``cell_plane``.

    Returns:
        (H, W) masks of its nuclei and of the whole cell, empty where there is none, and the number of its nuclei.
    """
    middle = (np.array(image.shape[1:]) - 1) / 2
    plane = cell_plane(image, nuclear, cell, background)
    single = segment_nuclei(image[nuclear]) if nuclear is not None else np.zeros(plane.shape, np.int32)
    black = np.percentile(image, 1.0, axis=(1, 2), keepdims=True) if background is None else background
    nuclei = shared_cells(image - black, nuclear, single)
    chosen = _nearest(nuclei, middle)
    if chosen:
        joined = np.unique(single[nuclei == chosen])
        own = _centred(single, joined, middle)
        nuclei = np.where(np.isin(single, np.setdiff1d(joined, own)), nuclei.max() + single, nuclei)
        return nuclei == chosen, segment_cells(plane, nuclei) == chosen, len(own)
    # No nucleus: whatever lies in the middle.
    body = ndimage.binary_fill_holes(_bright(ndimage.gaussian_filter(plane, 1.0))[1])
    bodies = _split(body, 0.4 * min(plane.shape))
    chosen = _nearest(bodies, middle)
    return np.zeros(plane.shape, bool), (bodies == chosen) & (chosen > 0), 0


def _centred(nuclei: Labels, joined: NDArray, middle: NDArray) -> NDArray:
    """Those of the joined nuclei that the image is centred on: the others are a neighbour's that the image cuts off."""
    area = np.bincount(nuclei.ravel())[joined].astype(np.float64)
    centre = np.array(ndimage.center_of_mass(nuclei > 0, nuclei, joined))
    sets = [list(s) for k in range(len(joined)) for s in combinations(range(len(joined)), k + 1)]
    return joined[min(sets, key=lambda s: float(np.hypot(*(area[s] @ centre[s] / area[s].sum() - middle))))]


def _nearest(labels: Labels, middle: NDArray) -> int:
    """The label nearest to the middle, by the nearest of its pixels and then its centre; 0 if none comes close."""
    if not labels.any():
        return 0
    index = np.unique(labels[labels > 0])
    y, x = np.indices(labels.shape)
    distance = np.hypot(y - middle[0], x - middle[1])
    reach = ndimage.minimum(distance, labels, index)
    centre = np.hypot(*(np.array(ndimage.center_of_mass(labels > 0, labels, index)) - middle).T)
    best = int(np.argmin(reach + centre))
    return int(index[best]) if reach[best] < min(labels.shape) / 4 else 0


PHOTOGRAPH = ("red", "green", "blue", "brightfield", "phase", "transmitted")
"""Channels, in any case, in which cells are darker than the empty ground."""


def compartments(
    image: Plane, channels: Sequence[str], nucleus_channel: str | None = None, cell_channel: str | None = None,
    background: float | None = None,
) -> tuple[dict[str, Mask], int | None]:  # fmt: skip
    """Masks of the cell in the middle, under the names of their features.

    In photographs (all channels named in PHOTOGRAPH) cells are looked for in the negative.

    Args:
        image: (C, H, W), any unit.
        channels: names of the C channels.
        nucleus_channel: name of the nuclei's; None: told by its name.
        cell_channel: name of the channel to find the cell in; None: all but the nuclei's.
        background: as of ``cell_plane``; not used for photographs.

    Returns:
        (H, W) masks of Nuclei, Cells and Cytoplasm, empty where there is none; and the number of nuclei.  Without a
        channel of nuclei, when nobody knows what of the cell is cytoplasm, only Cells and None.

    Raises:
        UserError: there is no channel of the name given.
    """
    if all(name.lower() in PHOTOGRAPH for name in channels):
        image, background = image.max(axis=(1, 2), keepdims=True) - image, None
    nuclear = find_channel(channels, nucleus_channel, NUCLEUS_NAMES)
    nuclei, cell, count = central_cell(image, nuclear, find_channel(channels, cell_channel), background)
    if nuclear is None:
        return {"Cells": cell}, None
    return {"Nuclei": nuclei, "Cells": cell, "Cytoplasm": cell & ~nuclei if count else nuclei}, count
