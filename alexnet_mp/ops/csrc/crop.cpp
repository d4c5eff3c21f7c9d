// What a CPU does to stored images, a row at a time while it is in the innermost cache; native.py compiles and calls it.
//
// The operations and their order are those of data/augment.py and data/statistics.py, which do the same where there is no compiler, to the bit.

#include <cstdint>

namespace {

#define VECTOR _Pragma("GCC ivdep")

struct Crop { long size, channel, row, pixel, flip, mean_channel, mean_row, mean_flip; };      // steps in bytes of the image, in values of the mean

template <bool FLIP> void widen(const std::uint8_t* __restrict from, float* __restrict to, long size, long pixel) {
    if (pixel == 1) {            // a plain vector loop
        VECTOR for (long i = 0; i < size; ++i) to[i] = from[FLIP ? size - 1 - i : i];
    } else {
        for (long i = 0; i < size; ++i) to[i] = from[(FLIP ? size - 1 - i : i) * pixel];
    }
}

template <bool FLIP> void subtract(const float* __restrict mean, float* __restrict to, long size) {
    VECTOR for (long i = 0; i < size; ++i) to[i] -= mean[FLIP ? size - 1 - i : i];
}

}  // namespace

// out (3, size, size) = ((image - mean - constant) + color) / divisor / scale of an image's crop; `image` is its first byte, `mean` the mean's.
// A null pointer, and a number that does nothing, stand for a step that is left out.
extern "C" void crop(const long* numbers, const std::uint8_t* image, const float* mean, float constant, const float* color, float divisor,
                     float scale, float* out) {
    const Crop& s = *reinterpret_cast<const Crop*>(numbers);
    for (long c = 0; c < 3; ++c) {
        for (long y = 0; y < s.size; ++y, out += s.size) {
            const std::uint8_t* row = image + c * s.channel + y * s.row;
            s.flip ? widen<true>(row, out, s.size, s.pixel) : widen<false>(row, out, s.size, s.pixel);
            if (mean) {
                const float* means = mean + c * s.mean_channel + y * s.mean_row;
                s.mean_flip ? subtract<true>(means, out, s.size) : subtract<false>(means, out, s.size);
            }
            if (constant != 0) VECTOR for (long i = 0; i < s.size; ++i) out[i] -= constant;
            if (color) VECTOR for (long i = 0; i < s.size; ++i) out[i] += color[c];
            if (divisor != 1) VECTOR for (long i = 0; i < s.size; ++i) out[i] /= divisor;
            if (scale != 1) VECTOR for (long i = 0; i < s.size; ++i) out[i] /= scale;
        }
    }
}

// The sums over the pixels of an image (3, pixels) of its colors' products, (3, 3). Whole numbers: any order gives the same.
extern "C" void color_products(const std::uint8_t* image, long pixels, double* products) {
    const std::uint8_t *r = image, *g = image + pixels, *b = image + 2 * pixels;
    std::int64_t sums[6] = {};
    for (long start = 0; start < pixels; start += 4096) {              // 4096 * 255 * 255 fits into 32 bits
        std::uint32_t part[6] = {};
        const long end = start + 4096 < pixels ? start + 4096 : pixels;
        for (long i = start; i < end; ++i) {
            const std::uint32_t x = r[i], y = g[i], z = b[i];
            part[0] += x * x; part[1] += x * y; part[2] += x * z; part[3] += y * y; part[4] += y * z; part[5] += z * z;
        }
        for (int k = 0; k < 6; ++k) sums[k] += part[k];
    }
    const int place[9] = {0, 1, 2, 1, 3, 4, 2, 4, 5};
    for (int k = 0; k < 9; ++k) products[k] = double(sums[place[k]]);
}
