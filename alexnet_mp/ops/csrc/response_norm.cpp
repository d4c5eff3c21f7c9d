// ReLU, response normalization over five maps and max pooling on a CPU, forward and backward.
// cpu_kernels.py compiles and calls it.
//
// y = x d^-3/4 with d = k + alpha * (x^2 summed over five neighboring maps); x is z, or max(z, 0)
// if `relu`. A block of pixels is copied into a buffer with gaps of zeros between its runs of maps.
// There the neighboring map is a fixed step away, whichever way the maps lie, so that every loop is
// a plain vector loop over what stays in the innermost cache. An image's result depends on that
// image alone, so it is the same on any number of threads and in any batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// The same fields, in the same order, as NormSettings of cpu_kernels.py; `pool_stride` 0: no pool.
struct NormSettings {
    std::int64_t images, maps, height, width, channels_last, relu, pool_stride;
    double k, alpha;
};

namespace {

struct Bf16 {
    std::uint16_t bits;
};

template <typename T>
struct Wide {
    using Type = T;
};
template <>
struct Wide<Bf16> {
    using Type = float;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) {
    std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, Bf16& out) {  // to nearest, ties to even; not a number stays that
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out.bits = std::uint16_t(x != x ? 0x7FC0 : rounded);
}

// WORDS: of one buffer; six of them fit a first-level cache of 48 KiB.
constexpr std::int64_t POOL = 3, GAP = 4, HALF = 2, WORDS = 2048;

// The vector loops, on pointers that the compiler may take for distinct.
#define VECTOR _Pragma("GCC ivdep")

template <typename W>
inline W window(const W* v, std::int64_t step) {
    return ((v[0] + v[step]) + (v[2 * step] + v[3 * step])) + v[4 * step];
}

template <typename W>
void square(const W* __restrict x, W* __restrict squares, std::int64_t length) {
    VECTOR for (std::int64_t i = 0; i < length; ++i) squares[i] = x[i] * x[i];
}

template <typename W>
void relu_in_place(W* __restrict x, std::int64_t length) {
    VECTOR for (std::int64_t i = 0; i < length; ++i) x[i] = x[i] < 0 ? W(0) : x[i];
}

template <typename W>
void normalize(const W* __restrict center, const W* __restrict squares, W* __restrict y,
               std::int64_t sums, std::int64_t step, W k, W alpha) {
    VECTOR for (std::int64_t i = 0; i < sums; ++i) {
        const W root = std::sqrt(k + alpha * window(squares + i, step));
        y[i] = center[i] / (root * std::sqrt(root));
    }
}

// u = g d^-3/4 and t = u x / d
template <typename W>
void gradient_shares(const W* __restrict center, const W* __restrict squares, const W* __restrict g,
                     W* __restrict u, W* __restrict t, std::int64_t sums, std::int64_t step, W k,
                     W alpha) {
    VECTOR for (std::int64_t i = 0; i < sums; ++i) {
        const W d = k + alpha * window(squares + i, step), root = std::sqrt(d);
        u[i] = g[i] / (root * std::sqrt(root));
        t[i] = u[i] * center[i] / d;
    }
}

template <typename W>
void gradient_sums(const W* __restrict center, const W* __restrict t, W* __restrict u,
                   std::int64_t sums, std::int64_t step, W factor, bool relu) {
    VECTOR for (std::int64_t i = 0; i < sums; ++i) u[i] -= factor * center[i] * window(t + i, step);
    if (relu) VECTOR for (std::int64_t i = 0; i < sums; ++i) u[i] = center[i] > 0 ? u[i] : W(0);
}

template <typename From, typename W>
void widen_all(const From* __restrict from, W* __restrict to, std::int64_t count) {
    VECTOR for (std::int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <typename W, typename To>
void narrow_all(const W* __restrict from, To* __restrict to, std::int64_t count) {
    VECTOR for (std::int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// Updates `at` and `best` with one more row of three places; not a number wins, and stays. Three at
// a time, because a loop over places in the loop over maps would not become vectors, and one at a
// time would be carried to memory and back for each.
template <typename W>
void keep_largest(const W* __restrict v, std::int64_t maps, std::int32_t place, W* __restrict best,
                  std::int32_t* __restrict at) {
    const W* __restrict first = v;
    const W* __restrict second = v + maps;
    const W* __restrict third = v + 2 * maps;
    VECTOR for (std::int64_t c = 0; c < maps; ++c) {
        W largest = best[c];
        std::int32_t found = at[c];
        const W one = first[c], two = second[c], three = third[c];
        found = (one > largest || one != one) ? place : found;
        largest = (one > largest || one != one) ? one : largest;
        found = (two > largest || two != two) ? place + 1 : found;
        largest = (two > largest || two != two) ? two : largest;
        found = (three > largest || three != three) ? place + 2 : found;
        largest = (three > largest || three != three) ? three : largest;
        best[c] = largest;
        at[c] = found;
    }
}

template <typename W>
void add_where(const W* __restrict g, const std::int32_t* __restrict at, W* __restrict to,
               std::int32_t place, std::int64_t count) {
    VECTOR for (std::int64_t c = 0; c < count; ++c) to[c] += at[c] == place ? g[c] : W(0);
}

template <typename T>
class Normalization {
    using W = typename Wide<T>::Type;
    const NormSettings settings;
    const W k, alpha;
    std::int64_t block, step, length, sums;
    std::vector<W> x, squares, u, t, g;

public:
    explicit Normalization(const NormSettings& s) : settings(s), k(W(s.k)), alpha(W(s.alpha)) {
        const std::int64_t pixels = s.height * s.width, run = s.maps + GAP;
        block = std::min(pixels, std::max<std::int64_t>(16, WORDS / run));
        step = s.channels_last ? 1 : block;
        length = block * run;
        sums = length - GAP * step;
        for (auto* buffer : {&x, &squares, &u, &t, &g}) buffer->assign(length, W(0));
    }

    template <typename Out>
    void forward(const T* z, Out* y) {
        each_block([&](std::int64_t first, std::int64_t count) {
            load(z, first, count);
            normalize(x.data() + HALF * step, squares.data(), u.data(), sums, step, k, alpha);
            store(y, first, count);
        });
    }

    template <typename In>
    void backward(const T* z, const In* gradient, T* dz) {
        each_block([&](std::int64_t first, std::int64_t count) {
            const W* center = x.data() + HALF * step;
            load(z, first, count);
            copy_in(gradient, g.data(), first, count);
            gradient_shares(center, squares.data(), g.data(), u.data(), t.data() + HALF * step,
                            sums, step, k, alpha);
            const W factor = W(1.5) * alpha;  // 2 alpha beta
            gradient_sums(center, t.data(), u.data(), sums, step, factor, settings.relu);
            store(dz, first, count);
        });
    }

private:
    template <typename Work>
    void each_block(Work work) {
        const std::int64_t pixels = settings.height * settings.width;
        for (std::int64_t first = 0; first < pixels; first += block)
            work(first, std::min(block, pixels - first));
    }

    // A shorter last block leaves old values behind it, which nobody reads.
    void load(const T* z, std::int64_t first, std::int64_t count) {
        copy_in(z, x.data() + HALF * step, first, count);
        if (settings.relu) relu_in_place(x.data(), length);
        square(x.data(), squares.data(), length);
    }

    template <typename In>
    void copy_in(const In* from, W* to, std::int64_t first, std::int64_t count) const {
        if (settings.channels_last)
            for (std::int64_t p = 0; p < count; ++p)
                widen_all(from + (first + p) * settings.maps, to + p * (settings.maps + GAP),
                          settings.maps);
        else
            for (std::int64_t c = 0; c < settings.maps; ++c)
                widen_all(from + c * settings.height * settings.width + first, to + c * block,
                          count);
    }

    template <typename Out>
    void store(Out* to, std::int64_t first, std::int64_t count) const {
        if (settings.channels_last)
            for (std::int64_t p = 0; p < count; ++p)
                narrow_all(u.data() + p * (settings.maps + GAP), to + (first + p) * settings.maps,
                           settings.maps);
        else
            for (std::int64_t c = 0; c < settings.maps; ++c)
                narrow_all(u.data() + c * block, to + c * settings.height * settings.width + first,
                           count);
    }
};

// Max pooling of channels-last maps; `where` is the place of the maximum in its window, the first
// of several, as in torch.
template <typename W, typename T>
void pool_forward(const NormSettings& s, const W* y, T* out, std::uint8_t* where) {
    const std::int64_t rows = (s.height - POOL) / s.pool_stride + 1,
                       columns = (s.width - POOL) / s.pool_stride + 1;
    std::vector<W> best(s.maps);
    std::vector<std::int32_t> at(s.maps);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
        const W* corner =
            y + ((i / columns) * s.pool_stride * s.width + (i % columns) * s.pool_stride) * s.maps;
        std::fill(best.begin(), best.end(), -std::numeric_limits<W>::infinity());
        std::fill(at.begin(), at.end(), 0);
        for (std::int64_t row = 0; row < POOL; ++row)
            keep_largest(corner + row * s.width * s.maps, s.maps, std::int32_t(POOL * row),
                         best.data(), at.data());
        narrow_all(best.data(), out + i * s.maps, s.maps);
        for (std::int64_t c = 0; c < s.maps; ++c) where[i * s.maps + c] = std::uint8_t(at[c]);
    }
}

template <typename W, typename T>
void pool_backward(const NormSettings& s, const T* gradient, const std::uint8_t* where, W* dy) {
    const std::int64_t rows = (s.height - POOL) / s.pool_stride + 1,
                       columns = (s.width - POOL) / s.pool_stride + 1;
    std::memset(dy, 0, sizeof(W) * s.maps * s.height * s.width);
    std::vector<W> g(s.maps);
    std::vector<std::int32_t> at(s.maps);
    for (std::int64_t i = 0; i < rows * columns; ++i) {
        W* corner =
            dy + ((i / columns) * s.pool_stride * s.width + (i % columns) * s.pool_stride) * s.maps;
        widen_all(gradient + i * s.maps, g.data(), s.maps);
        for (std::int64_t c = 0; c < s.maps; ++c) at[c] = where[i * s.maps + c];
        for (std::int64_t place = 0; place < POOL * POOL; ++place) {
            W* other = corner + ((place / POOL) * s.width + place % POOL) * s.maps;
            add_where(g.data(), at.data(), other, std::int32_t(place), s.maps);
        }
    }
}

template <typename T>
void forward(const NormSettings& s, const T* z, T* out, std::uint8_t* where) {
    using W = typename Wide<T>::Type;
    Normalization<T> norm(s);
    const std::int64_t size = s.maps * s.height * s.width;
    if (!s.pool_stride) {
        for (std::int64_t n = 0; n < s.images; ++n) norm.forward(z + n * size, out + n * size);
        return;
    }
    const std::int64_t pooled =
        s.maps * ((s.height - POOL) / s.pool_stride + 1) * ((s.width - POOL) / s.pool_stride + 1);
    std::vector<W> y(size);
    for (std::int64_t n = 0; n < s.images; ++n) {
        norm.forward(z + n * size, y.data());
        pool_forward(s, y.data(), out + n * pooled, where + n * pooled);
    }
}

template <typename T>
void backward(const NormSettings& s, const T* z, const T* gradient, const std::uint8_t* where,
              T* dz) {
    using W = typename Wide<T>::Type;
    Normalization<T> norm(s);
    const std::int64_t size = s.maps * s.height * s.width;
    if (!s.pool_stride) {
        for (std::int64_t n = 0; n < s.images; ++n)
            norm.backward(z + n * size, gradient + n * size, dz + n * size);
        return;
    }
    const std::int64_t pooled =
        s.maps * ((s.height - POOL) / s.pool_stride + 1) * ((s.width - POOL) / s.pool_stride + 1);
    std::vector<W> dy(size);
    for (std::int64_t n = 0; n < s.images; ++n) {
        pool_backward(s, gradient + n * pooled, where + n * pooled, dy.data());
        norm.backward(z + n * size, dy.data(), dz + n * size);
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                            \
    extern "C" void forward_##NAME(const NormSettings* s, const void* z, void* out, void* where) { \
        forward<T>(*s, (const T*)z, (T*)out, (std::uint8_t*)where);                                \
    }                                                                                              \
    extern "C" void backward_##NAME(const NormSettings* s, const void* z, const void* gradient,    \
                                    const void* where, void* dz) {                                 \
        backward<T>(*s, (const T*)z, (const T*)gradient, (const std::uint8_t*)where, (T*)dz);      \
    }

EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, Bf16)

// cpu_kernels.py compares it with the size of its own structure.
extern "C" std::int64_t norm_settings_size() { return sizeof(NormSettings); }
