// The crop of a stored image as training reads it, and the sums that a store's statistics need.
// cpu_kernels.py compiles and calls it. An image is worked on a row at a time, in the innermost
// cache.
//
// The operations and their order are those of data/transforms.py and data/statistics.py, which give
// the same to the bit where there is no compiler.

#include <cstdint>

// The same fields, in the same order, as CropSettings of cpu_kernels.py. A step is the distance
// between neighboring channels, rows or pixels: in bytes for the image, in values for the mean.
struct CropSettings {
    std::int64_t size, channel_step, row_step, pixel_step, flip;
    std::int64_t mean_channel_step, mean_row_step, mean_flip;
    float constant, divisor, scale;
};

namespace {

#define VECTOR _Pragma("GCC ivdep")

template <bool FLIP>
void widen(const std::uint8_t* __restrict from, float* __restrict to, std::int64_t size,
           std::int64_t pixel) {
    if (pixel == 1) {  // a plain vector loop
        VECTOR for (std::int64_t i = 0; i < size; ++i) to[i] = from[FLIP ? size - 1 - i : i];
    } else {
        for (std::int64_t i = 0; i < size; ++i) to[i] = from[(FLIP ? size - 1 - i : i) * pixel];
    }
}

template <bool FLIP>
void subtract(const float* __restrict mean, float* __restrict to, std::int64_t size) {
    VECTOR for (std::int64_t i = 0; i < size; ++i) to[i] -= mean[FLIP ? size - 1 - i : i];
}

}  // namespace

// out (3, size, size) = ((image - mean - constant) + color) / divisor / scale of an image's crop.
// `image` points to the crop's first byte, `mean` to the first value below it. A null pointer, and
// a number that changes nothing, stand for a step that is left out.
extern "C" void crop(const CropSettings* settings, const std::uint8_t* image, const float* mean,
                     const float* color, float* out) {
    const CropSettings s = *settings;  // a copy, which `out` cannot overwrite
    for (std::int64_t c = 0; c < 3; ++c) {
        for (std::int64_t y = 0; y < s.size; ++y, out += s.size) {
            const std::uint8_t* row = image + c * s.channel_step + y * s.row_step;
            s.flip ? widen<true>(row, out, s.size, s.pixel_step)
                   : widen<false>(row, out, s.size, s.pixel_step);
            if (mean) {
                const float* means = mean + c * s.mean_channel_step + y * s.mean_row_step;
                s.mean_flip ? subtract<true>(means, out, s.size)
                            : subtract<false>(means, out, s.size);
            }
            if (s.constant != 0)
                VECTOR for (std::int64_t i = 0; i < s.size; ++i) out[i] -= s.constant;
            if (color) VECTOR for (std::int64_t i = 0; i < s.size; ++i) out[i] += color[c];
            if (s.divisor != 1)
                VECTOR for (std::int64_t i = 0; i < s.size; ++i) out[i] /= s.divisor;
            if (s.scale != 1) VECTOR for (std::int64_t i = 0; i < s.size; ++i) out[i] /= s.scale;
        }
    }
}

// cpu_kernels.py compares it with the size of its own structure.
extern "C" std::int64_t crop_settings_size() { return sizeof(CropSettings); }

// The sums over the pixels of an image (3, pixels) of its colors' products, (3, 3). Whole numbers:
// any order gives the same.
extern "C" void color_products(const std::uint8_t* image, std::int64_t pixels, double* products) {
    const std::uint8_t *r = image, *g = image + pixels, *b = image + 2 * pixels;
    std::int64_t sums[6] = {};
    for (std::int64_t start = 0; start < pixels;
         start += 4096) {  // 4096 * 255 * 255 fits into 32 bits
        std::uint32_t part[6] = {};
        const std::int64_t end = start + 4096 < pixels ? start + 4096 : pixels;
        for (std::int64_t i = start; i < end; ++i) {
            const std::uint32_t x = r[i], y = g[i], z = b[i];
            part[0] += x * x;
            part[1] += x * y;
            part[2] += x * z;
            part[3] += y * y;
            part[4] += y * z;
            part[5] += z * z;
        }
        for (int k = 0; k < 6; ++k) sums[k] += part[k];
    }
    const int place[9] = {0, 1, 2, 1, 3, 4, 2, 4, 5};
    for (int k = 0; k < 9; ++k) products[k] = double(sums[place[k]]);
}
