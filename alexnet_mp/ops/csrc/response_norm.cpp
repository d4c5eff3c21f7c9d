// ReLU, response normalization over five maps and max pooling of a CPU, forward and backward; native.py compiles and calls it.
//
// y = x d^-3/4 with d = k + alpha * (x^2 summed over five neighboring maps); x is z, or max(z, 0) where `rectify`.
// A block of pixels is copied into a buffer with gaps of zeros between its runs of maps. There the neighboring map is a fixed step away,
// whichever way the maps lie, so that every loop is a plain vector loop over what stays in the innermost cache.
// An image's result depends on that image alone, so it is the same on any number of threads and in any batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

struct Bf16 { std::uint16_t bits; };

template <typename T> struct Wide { using Type = T; };
template <> struct Wide<Bf16> { using Type = float; };

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
inline void narrow(float x, Bf16& out) {                  // to nearest, ties to even; not a number stays that
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    out.bits = std::uint16_t(x != x ? 0x7FC0 : rounded);
}

struct Shape { long images, maps, height, width, last, rectify, pool, stride; };     // last: channels-last; pool: whether to

constexpr long POOL = 3, GAP = 4, HALF = 2, WORDS = 2048;           // WORDS: of one buffer, six of which fit a first-level cache of 48 KiB

// The vector loops, on pointers that the compiler may take for distinct.
#define VECTOR _Pragma("GCC ivdep")

template <typename W> inline W window(const W* v, long step) { return ((v[0] + v[step]) + (v[2 * step] + v[3 * step])) + v[4 * step]; }

template <typename W> void square(const W* __restrict x, W* __restrict squares, long length) {
    VECTOR for (long i = 0; i < length; ++i) squares[i] = x[i] * x[i];
}

template <typename W> void rectify_in_place(W* __restrict x, long length) {
    VECTOR for (long i = 0; i < length; ++i) x[i] = x[i] < 0 ? W(0) : x[i];
}

template <typename W> void normalize(const W* __restrict center, const W* __restrict squares, W* __restrict y, long sums, long step, W k, W alpha) {
    VECTOR for (long i = 0; i < sums; ++i) {
        const W root = std::sqrt(k + alpha * window(squares + i, step));
        y[i] = center[i] / (root * std::sqrt(root));
    }
}

// u = g d^-3/4 and t = u x / d
template <typename W> void share_out(const W* __restrict center, const W* __restrict squares, const W* __restrict g, W* __restrict u, W* __restrict t,
                                     long sums, long step, W k, W alpha) {
    VECTOR for (long i = 0; i < sums; ++i) {
        const W d = k + alpha * window(squares + i, step), root = std::sqrt(d);
        u[i] = g[i] / (root * std::sqrt(root));
        t[i] = u[i] * center[i] / d;
    }
}

template <typename W> void collect(const W* __restrict center, const W* __restrict t, W* __restrict u, long sums, long step, W factor, bool rectified) {
    VECTOR for (long i = 0; i < sums; ++i) u[i] -= factor * center[i] * window(t + i, step);
    if (rectified)
        VECTOR for (long i = 0; i < sums; ++i) u[i] = center[i] > 0 ? u[i] : W(0);
}

template <typename From, typename W> void widen_all(const From* __restrict from, W* __restrict to, long count) {
    VECTOR for (long i = 0; i < count; ++i) to[i] = widen(from[i]);
}

template <typename W, typename To> void narrow_all(const W* __restrict from, To* __restrict to, long count) {
    VECTOR for (long i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// `at` and `best` learn of one more row of three places; not a number wins, and stays. Three at a time, because a loop over places in the
// loop over maps would not become vectors, and one at a time would be carried to memory and back for each.
template <typename W> void keep_largest(const W* __restrict v, long maps, std::int32_t place, W* __restrict best, std::int32_t* __restrict at) {
    const W* __restrict first = v;
    const W* __restrict second = v + maps;
    const W* __restrict third = v + 2 * maps;
    VECTOR for (long c = 0; c < maps; ++c) {
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

template <typename W> void add_where(const W* __restrict g, const std::int32_t* __restrict at, W* __restrict to, std::int32_t place, long count) {
    VECTOR for (long c = 0; c < count; ++c) to[c] += at[c] == place ? g[c] : W(0);
}

template <typename T> class Norm {
    using W = typename Wide<T>::Type;
    const Shape shape;
    const W k, alpha;
    long block, step, length, sums;
    std::vector<W> x, squares, u, t, g;

public:
    Norm(const Shape& s, double k_, double alpha_) : shape(s), k(W(k_)), alpha(W(alpha_)) {
        const long pixels = s.height * s.width, run = s.maps + GAP;
        block = std::min(pixels, std::max(16L, WORDS / run));
        step = s.last ? 1 : block;
        length = block * run;
        sums = length - GAP * step;
        for (auto* buffer : {&x, &squares, &u, &t, &g}) buffer->assign(length, W(0));
    }

    template <typename Out> void forward(const T* z, Out* y) {
        each_block([&](long first, long count) {
            load(z, first, count);
            normalize(x.data() + HALF * step, squares.data(), u.data(), sums, step, k, alpha);
            store(y, first, count);
        });
    }

    template <typename In> void backward(const T* z, const In* gradient, T* dz) {
        each_block([&](long first, long count) {
            const W* center = x.data() + HALF * step;
            load(z, first, count);
            copy_in(gradient, g.data(), first, count);
            share_out(center, squares.data(), g.data(), u.data(), t.data() + HALF * step, sums, step, k, alpha);
            collect(center, t.data(), u.data(), sums, step, W(1.5) * alpha, shape.rectify);      // 2 alpha beta
            store(dz, first, count);
        });
    }

private:
    template <typename Work> void each_block(Work work) {
        const long pixels = shape.height * shape.width;
        for (long first = 0; first < pixels; first += block) work(first, std::min(block, pixels - first));
    }

    void load(const T* z, long first, long count) {        // a shorter last block leaves old values behind it, which nobody reads
        copy_in(z, x.data() + HALF * step, first, count);
        if (shape.rectify) rectify_in_place(x.data(), length);
        square(x.data(), squares.data(), length);
    }

    template <typename In> void copy_in(const In* from, W* to, long first, long count) const {
        if (shape.last)
            for (long p = 0; p < count; ++p) widen_all(from + (first + p) * shape.maps, to + p * (shape.maps + GAP), shape.maps);
        else
            for (long c = 0; c < shape.maps; ++c) widen_all(from + c * shape.height * shape.width + first, to + c * block, count);
    }

    template <typename Out> void store(Out* to, long first, long count) const {
        if (shape.last)
            for (long p = 0; p < count; ++p) narrow_all(u.data() + p * (shape.maps + GAP), to + (first + p) * shape.maps, shape.maps);
        else
            for (long c = 0; c < shape.maps; ++c) narrow_all(u.data() + c * block, to + c * shape.height * shape.width + first, count);
    }
};

// Max pooling of channels-last maps; `where` is the place of the maximum in its window, the first of several, as in torch.
template <typename W, typename T> void pool_forward(const Shape& s, const W* y, T* out, std::uint8_t* where) {
    const long rows = (s.height - POOL) / s.stride + 1, columns = (s.width - POOL) / s.stride + 1;
    std::vector<W> best(s.maps);
    std::vector<std::int32_t> at(s.maps);
    for (long i = 0; i < rows * columns; ++i) {
        const W* corner = y + ((i / columns) * s.stride * s.width + (i % columns) * s.stride) * s.maps;
        std::fill(best.begin(), best.end(), -std::numeric_limits<W>::infinity());
        std::fill(at.begin(), at.end(), 0);
        for (long row = 0; row < POOL; ++row) keep_largest(corner + row * s.width * s.maps, s.maps, std::int32_t(POOL * row), best.data(), at.data());
        narrow_all(best.data(), out + i * s.maps, s.maps);
        for (long c = 0; c < s.maps; ++c) where[i * s.maps + c] = std::uint8_t(at[c]);
    }
}

template <typename W, typename T> void pool_backward(const Shape& s, const T* gradient, const std::uint8_t* where, W* dy) {
    const long rows = (s.height - POOL) / s.stride + 1, columns = (s.width - POOL) / s.stride + 1;
    std::memset(dy, 0, sizeof(W) * s.maps * s.height * s.width);
    std::vector<W> g(s.maps);
    std::vector<std::int32_t> at(s.maps);
    for (long i = 0; i < rows * columns; ++i) {
        W* corner = dy + ((i / columns) * s.stride * s.width + (i % columns) * s.stride) * s.maps;
        widen_all(gradient + i * s.maps, g.data(), s.maps);
        for (long c = 0; c < s.maps; ++c) at[c] = where[i * s.maps + c];
        for (long place = 0; place < POOL * POOL; ++place) {
            W* other = corner + ((place / POOL) * s.width + place % POOL) * s.maps;
            add_where(g.data(), at.data(), other, std::int32_t(place), s.maps);
        }
    }
}

template <typename T> void forward(const Shape& s, double k, double alpha, const T* z, T* out, std::uint8_t* where) {
    using W = typename Wide<T>::Type;
    Norm<T> norm(s, k, alpha);
    const long size = s.maps * s.height * s.width;
    if (!s.pool) {
        for (long n = 0; n < s.images; ++n) norm.forward(z + n * size, out + n * size);
        return;
    }
    const long pooled = s.maps * ((s.height - POOL) / s.stride + 1) * ((s.width - POOL) / s.stride + 1);
    std::vector<W> y(size);
    for (long n = 0; n < s.images; ++n) {
        norm.forward(z + n * size, y.data());
        pool_forward(s, y.data(), out + n * pooled, where + n * pooled);
    }
}

template <typename T> void backward(const Shape& s, double k, double alpha, const T* z, const T* gradient, const std::uint8_t* where, T* dz) {
    using W = typename Wide<T>::Type;
    Norm<T> norm(s, k, alpha);
    const long size = s.maps * s.height * s.width;
    if (!s.pool) {
        for (long n = 0; n < s.images; ++n) norm.backward(z + n * size, gradient + n * size, dz + n * size);
        return;
    }
    const long pooled = s.maps * ((s.height - POOL) / s.stride + 1) * ((s.width - POOL) / s.stride + 1);
    std::vector<W> dy(size);
    for (long n = 0; n < s.images; ++n) {
        pool_backward(s, gradient + n * pooled, where + n * pooled, dy.data());
        norm.backward(z + n * size, dy.data(), dz + n * size);
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                                                    \
    extern "C" void forward_##NAME(const long* shape, double k, double alpha, const void* z, void* out, void* where) {                     \
        forward<T>(*reinterpret_cast<const Shape*>(shape), k, alpha, (const T*)z, (T*)out, (std::uint8_t*)where);                          \
    }                                                                                                                                      \
    extern "C" void backward_##NAME(const long* shape, double k, double alpha, const void* z, const void* gradient, const void* where, void* dz) { \
        backward<T>(*reinterpret_cast<const Shape*>(shape), k, alpha, (const T*)z, (const T*)gradient, (const std::uint8_t*)where, (T*)dz);  \
    }

EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, Bf16)
