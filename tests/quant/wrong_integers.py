"""Wrong versions of affine integers and of 8-bit products, each wrong in one way."""

import numpy as np

from minift.nn.linear import rows
from minift.quant import affine
from minift.quant.int8_vectorwise import decoded, integer_product_2, quantize_rows

f32 = np.float32


# --- affine: `round_trip(x, bits, block_size) -> codes, x̂` ----------------------------------------------------------


class Affine:
    """Right, one block after the other."""

    def __call__(self, x, bits, block_size):
        found = [self.block(b.astype(np.float64), 2**bits - 1) for b in self.blocks(x.ravel(), block_size)]
        codes, back = (np.concatenate([f[i] for f in found] or [np.zeros(0)]) for i in (0, 1))
        return codes.astype(np.uint8), back.astype(f32).reshape(x.shape)

    def blocks(self, flat, block_size):
        return [flat[i : i + block_size] for i in range(0, flat.size, block_size)]

    def block(self, x, top):
        m, s = self.least(x), f32((x.max() - x.min()) / top)
        q = np.minimum(self.rint((x - m) / (s or 1)), top)
        return q, q * s + m

    def least(self, x):
        return x.min()

    def rint(self, q):
        return np.rint(q)


class AffineTruncates(Affine):
    def rint(self, q):
        return np.floor(q)


class AffineTiesUp(Affine):
    def rint(self, q):
        return np.floor(q + 0.5)


class AffineSixteenSteps(Affine):
    """The range divided by the number of codes, not of steps."""

    def block(self, x, top):
        return super().block(x, top + 1)


class AffineWraps(AffineSixteenSteps):
    def block(self, x, top):
        q, back = super().block(x, top)
        return q % (top + 1), back


class AffineFromZero(Affine):
    def least(self, x):
        return min(x.min(), 0)


class AffineOneBlock(Affine):
    def blocks(self, flat, block_size):
        return [flat] if flat.size else []


class AffineLeastDoubled(Affine):
    def block(self, x, top):
        q, back = super().block(x, top)
        return q, back + self.least(x)


AFFINE = (AffineTruncates, AffineTiesUp, AffineSixteenSteps, AffineWraps, AffineFromZero, AffineOneBlock)
AFFINE += (AffineLeastDoubled,)


def affine_round_trip(x, bits, block_size):
    """Ours, in the same form."""
    q = affine.quantize(x, bits, block_size)
    return q.codes, affine.dequantize(q)


# --- int8: `forward(x, w: Int8Tensor, threshold) -> y, vjp` -----------------------------------------------------------


class Product:
    """Right, in the same steps, each of which a subclass replaces."""

    def __call__(self, x, w, threshold):
        q, a, outliers = self.codes(rows(x), threshold)
        y = self.scaled(self.product(q, w.codes).astype(x.dtype), a.astype(x.dtype), w.absmax.astype(x.dtype))
        y = y + self.apart(rows(x), w, outliers)
        return y.reshape(*x.shape[:-1], w.shape[0]).astype(x.dtype), lambda dy: self.pullback(dy, x, w, outliers)

    def codes(self, x, threshold):
        return quantize_rows(x, threshold)

    def product(self, q, p):
        return integer_product_2(q, p)

    def scaled(self, total, a, b):
        return total * np.multiply.outer(a, b) / 127**2

    def apart(self, x, w, outliers):
        return x[:, outliers] @ decoded(w.codes[:, outliers], w.absmax).T

    def pullback(self, dy, x, w, outliers):
        return dy @ w.dense(dy.dtype)


class OutliersForgotten(Product):
    def apart(self, x, w, outliers):
        return np.zeros((len(x), w.shape[0]), x.dtype)


class OutliersTwice(Product):
    def codes(self, x, threshold):
        _, a, outliers = quantize_rows(x, threshold)
        return np.clip(np.rint(x * (127 / np.maximum(a, 1e-36))[:, None]), -127, 127).astype(np.int8), a, outliers


class OutliersInTheScale(Product):
    """Columns kept apart, after they have spoiled the scale."""

    def codes(self, x, threshold):
        _, _, outliers = quantize_rows(x, threshold)
        a = np.abs(x).max(axis=1, initial=0).astype(f32)
        q = np.rint(x * (127 / np.maximum(a, 1e-36))[:, None]).astype(np.int8)
        q[:, outliers] = 0
        return q, a, outliers


class OneScale(Product):
    """Per tensor instead of vector-wise."""

    def codes(self, x, threshold):
        q, a, outliers = quantize_rows(x.reshape(1, -1), threshold)
        return q.reshape(x.shape), np.repeat(a, len(x)), outliers % x.shape[1]


class ThresholdPerRow(Product):
    """Outliers are taken out element by element, but only columns where all are outliers are added again."""

    def codes(self, x, threshold):
        q, a, outliers = quantize_rows(x, threshold)
        return q, a, outliers[(np.abs(x[:, outliers]) >= threshold).all(axis=0)] if threshold else outliers


class AboveOnly(Product):
    """Outliers on the positive side only."""

    def codes(self, x, threshold):
        outliers = quantize_rows(np.maximum(x, 0), threshold)[2]
        b = np.abs(np.where(np.isin(np.arange(x.shape[1]), outliers), 0, x)).max(axis=1, initial=0).astype(f32)
        q = np.rint(x * (127 / np.maximum(b, 1e-36))[:, None]).astype(np.int8)
        q[:, outliers] = 0
        return q, b, outliers


class Divides128(Product):
    def scaled(self, total, a, b):
        return total * np.multiply.outer(a, b) / 128**2


class ScalesSwapped(Product):
    def scaled(self, total, a, b):
        n = max(len(a), len(b), 1)
        return total * np.multiply.outer(np.resize(b, n)[: len(a)], np.resize(a, n)[: len(b)]) / 127**2


class SumsIn16Bits(Product):
    def product(self, q, p):
        return integer_product_2(q, p).astype(np.int16)


class SumsInHalfPrecision(Product):
    def product(self, q, p):
        return integer_product_2(q, p).astype(np.float16)


class PullbackOfOutliersOnly(Product):
    def pullback(self, dy, x, w, outliers):
        dx = np.zeros((*dy.shape[:-1], w.shape[1]), dy.dtype)
        dx[..., outliers] = dy @ w.dense(dy.dtype)[:, outliers]
        return dx


class PullbackTransposed(Product):
    def pullback(self, dy, x, w, outliers):
        return dy @ w.dense(dy.dtype).T.reshape(w.shape)


class PullbackWithoutScales(Product):
    def pullback(self, dy, x, w, outliers):
        return dy @ w.codes.astype(dy.dtype)


PRODUCTS = (OutliersForgotten, OutliersTwice, OutliersInTheScale, OneScale, ThresholdPerRow, AboveOnly, Divides128)
PRODUCTS += (ScalesSwapped, SumsIn16Bits, SumsInHalfPrecision, PullbackOfOutliersOnly, PullbackTransposed)
PRODUCTS += (PullbackWithoutScales,)
