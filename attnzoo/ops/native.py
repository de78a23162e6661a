"""The power map as one pass in C, for CPUs: built by the system's compiler when first asked for.

Written with torch's operators the map is a dozen passes over memory, and on a CPU memory is what
they cost. Where there is no compiler, or with ATTNZOO_NATIVE=0 in the environment, ``library``
returns None and ``attnzoo.ops.focused`` does without. The build takes a second, is kept in the
user's cache (XDG_CACHE_HOME, else ~/.cache) and needs nothing but a C compiler (CC, else cc).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

# What attnzoo.ops.focused._forward and _backward compute, with their reasons there. T is how
# tensors are stored; numbers are float. NaN must come out where it goes in, so no -ffast-math.
_KERNEL = r"""
#define EACH for (long i = 0; i < d; i++)
/* A row is often a part of a longer one, and the hardware does not see the next one coming. */
#define AHEAD(row, write) \
    for (long i = 0; i < d; i += 64 / (long)sizeof(T)) __builtin_prefetch((row) + i, write);

void NAME(forward)(const T *z, long stride, const float *gamma, T *out, float *peaks,
                   float *norms, long rows, long d) {
    float *power = malloc(d * sizeof(float));
    for (long row = 0; row < rows; row++, z += stride, out += d) {
        if (row + 1 < rows) { AHEAD(z + stride, 0) AHEAD(out + d, 1) }
        float peak = TINY, poison = 0, squares = 0, sum = 0;
        _Pragma("omp simd reduction(max:peak) reduction(+:poison)") EACH {
            float x = LOAD(z[i]);
            peak = x > peak ? x : peak;
            poison += x * 0;
        }
        float inverse = 1 / peak, exponent = gamma[row] * 1.44269504f, top = 0;
        if (exponent < 0) { /* the smallest positive entry has the largest power */
            float low = 1;
            EACH {
                float x = LOAD(z[i]), unit = x * inverse;
                low = x > TINY && unit < low ? unit : low;
            }
            top = exponent * natural_log(low > TINY ? low : TINY);
        }
        _Pragma("omp simd reduction(+:squares,sum)") EACH {
            float x = LOAD(z[i]), unit = x * inverse;
            unit = unit > TINY ? unit : TINY;
            squares += unit * unit;
            float raised = power_of_2(exponent * natural_log(unit) - top);
            power[i] = x > TINY ? raised : 0;
            sum += power[i] * power[i];
        }
        float norm = sqrtf(squares) * peak + poison, width = sqrtf(sum);
        float scale = norm / (width > TINY ? width : TINY);
        _Pragma("omp simd") EACH out[i] = STORE(power[i] * scale + poison);
        peaks[row] = peak;
        norms[row] = norm;
    }
    free(power);
}

void NAME(backward)(const T *grad, long grad_stride, const T *z, long stride, const float *gamma,
                    const T *out, const float *peaks, const float *norms, T *grad_z,
                    float *grad_gamma, long rows, long d) {
    for (long row = 0; row < rows; row++) {
        if (row + 1 < rows) {
            AHEAD(z + stride, 0) AHEAD(grad + grad_stride, 0)
            AHEAD(out + d, 0) AHEAD(grad_z + d, 1)
        }
        float norm = norms[row] < TINY ? TINY : norms[row], inverse = 1 / peaks[row];
        float slope = gamma[row] * inverse, dot = 0, by_gamma = 0;
        slope = slope > FLT_MAX ? FLT_MAX : slope < -FLT_MAX ? -FLT_MAX : slope;
        _Pragma("omp simd reduction(+:dot)") EACH dot += LOAD(grad[i]) * LOAD(out[i]);
        float along = dot / norm / norm;
        _Pragma("omp simd reduction(+:by_gamma)") EACH {
            float x = LOAD(z[i]), y = LOAD(out[i]), unit = x * inverse;
            unit = unit > TINY ? unit : TINY;
            float shared = (LOAD(grad[i]) - y * along) * y;
            by_gamma += shared * natural_log(unit);
            float slant = shared * slope / unit + x * along;
            grad_z[i] = STORE(x <= TINY ? 0 : slant);
        }
        grad_gamma[row] = by_gamma;
        z += stride, grad += grad_stride, out += d, grad_z += d;
    }
}
"""

_SOURCE = r"""
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#define TINY FLT_MIN

static inline float as_float(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t b; __builtin_memcpy(&b, &x, 4); return b; }

/* Cephes' polynomials, in Horner's form; x is positive, normal and finite. */
static inline float natural_log(float x) {
    uint32_t bits = as_bits(x) - 0x3f3504f3u; /* counts exponents from sqrt(1/2) */
    float exponent = (float)((int32_t)bits >> 23);
    float m = as_float((bits & 0x7fffffu) + 0x3f3504f3u) - 1;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f; p = p * m + 1.1676998740e-1f; p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f; p = p * m - 1.6668057665e-1f; p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f; p = p * m + 3.3333331174e-1f;
    return (m + (m * m) * (m * p - 0.5f)) + exponent * 0.693147181f;
}

static inline float power_of_2(float x) {
    float bounded = x < -126 ? -126 : x > 127 ? 127 : x;
    float whole = rintf(bounded), f = bounded - whole;
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f; p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f; p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    float result = (p * f + 1) * as_float((uint32_t)((int32_t)whole + 127) << 23);
    return x < -126 ? 0 : result;
}

static inline float widen(uint16_t x) { return as_float((uint32_t)x << 16); }
static inline uint16_t narrow(float x) {
    uint32_t bits = as_bits(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1);
    return x != x ? 0x7fc0 : rounded >> 16;
}

#define T float
#define NAME(x) power_map_##x##_float32
#define LOAD(x) (x)
#define STORE(x) (x)
KERNEL
#undef T
#undef NAME
#undef LOAD
#undef STORE
#undef EACH
#undef AHEAD
#define T uint16_t
#define NAME(x) power_map_##x##_bfloat16
#define LOAD(x) widen(x)
#define STORE(x) narrow(x)
KERNEL
"""

_FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-shared", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # a third faster than the compiler's own choice


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are not wanted or cannot be built."""
    if os.environ.get("ATTNZOO_NATIVE") == "0":
        return None
    source = _SOURCE.replace("KERNEL", _KERNEL)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    try:
        # The code is for this very processor: a home may be shared by several.
        cpu = Path("/proc/cpuinfo")
        flags = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1]
        key = "\n".join([source, *compiler, *_FLAGS, platform.machine(), *flags])
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "attnzoo")
        built = cache / f"power_map-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not built.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                code, target = Path(folder, "power_map.c"), Path(folder, "power_map.so")
                code.write_text(source)
                command = [*compiler, *_FLAGS, str(code), "-o", str(target), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                target.replace(built)  # at once, so that another process sees all or nothing
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None
