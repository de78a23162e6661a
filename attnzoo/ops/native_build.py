"""The C code of every operator's ``native.py``, built when first asked for.

The build takes a second and needs nothing but a C compiler (CC, else cc); where there is none,
``library`` returns None. It is cached in a folder that only the user can write to (attnzoo
in XDG_CACHE_HOME, else in ~/.cache) with its hash; where there is no such folder, every process
builds its own. Only what has the right hash is loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import uuid
import warnings
from pathlib import Path

# What torch.py's _forward and _backward compute, with their reasons there. T is how
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
        /* From exponent 1 on a power over its unit is at most 1, and divides first, as ever.
           Below, it may overflow, unless a small slope comes before. */
        float before = gamma[row] >= 1 ? 1 : slope, after = gamma[row] >= 1 ? slope : 1;
        _Pragma("omp simd reduction(+:dot)") EACH dot += LOAD(grad[i]) * LOAD(out[i]);
        float along = dot / norm / norm;
        _Pragma("omp simd reduction(+:by_gamma)") EACH {
            float x = LOAD(z[i]), y = LOAD(out[i]), unit = x * inverse;
            unit = unit > TINY ? unit : TINY;
            float shared = (LOAD(grad[i]) - y * along) * y;
            by_gamma += shared * natural_log(unit);
            float slant = shared * before / unit * after + x * along;
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

/* The first of the largest products of a row, which may be in two parts, with a router's rows. */
static long largest(const float *x, const float *y, const float *router, long choices, long d) {
    long best = 0;
    float most = -INFINITY;
    for (long e = 0; e < choices; e++) {
        float sum = 0;
        _Pragma("omp simd reduction(+:sum)") for (long i = 0; i < d; i++) sum += x[i] * *router++;
        if (y) {
            _Pragma("omp simd reduction(+:sum)")
            for (long i = 0; i < d; i++) sum += y[i] * *router++;
        }
        if (sum > most) { most = sum; best = e; }
    }
    return best;
}

void focused_difference(const float *z1, const float *z2, const float *r1, const float *r2,
                        const float *rd, const float *gammas, const float *lambdas, float *base,
                        float *out, int64_t *chosen, long rows, long d, long n_gamma,
                        long n_lambda) {
    for (long row = 0; row < rows; row++, z1 += d, z2 += d, base += d, out += d) {
        float peak, norm;
        long first = largest(z1, 0, r1, n_gamma, d), second = largest(z2, 0, r2, n_gamma, d);
        power_map_forward_float32(z1, d, gammas + first, base, &peak, &norm, 1, d);
        power_map_forward_float32(z2, d, gammas + second, out, &peak, &norm, 1, d);
        long third = largest(base, out, rd, n_lambda, d);
        for (long i = 0; i < d; i++) out[i] = base[i] - lambdas[third] * out[i];
        chosen[row] = first, chosen[rows + row] = second, chosen[2 * rows + row] = third;
    }
}

/* ``strides`` of samples, heads and tokens, of each of the six tensors before it. */
void linear_core(const float *q, const float *qn, const float *k, const float *kn, const float *v,
                 float *out, const long *strides, float *state, float eps, long batch, long heads,
                 long n, long m, long d, long e) {
#define AT(z, t, place) \
    (z + b * strides[3 * t] + head * strides[3 * t + 1] + place * strides[3 * t + 2])
    float *sums = state + d * e;
    for (long b = 0; b < batch; b++)
        for (long head = 0; head < heads; head++) {
            for (long i = 0; i < d * (e + 1); i++) state[i] = 0;
            for (long j = 0; j < m; j++) {
                const float *key = AT(k, 2, j), *norm = AT(kn, 3, j), *value = AT(v, 4, j);
                for (long i = 0; i < d; i++) {
                    sums[i] += norm[i];
                    _Pragma("omp simd") for (long c = 0; c < e; c++)
                        state[i * e + c] += key[i] * value[c];
                }
            }
            for (long j = 0; j < n; j++) {
                const float *query = AT(q, 0, j), *norm = AT(qn, 1, j);
                float *result = AT(out, 5, j), total = 0;
                for (long c = 0; c < e; c++) result[c] = 0;
                for (long i = 0; i < d; i++) {
                    total += norm[i] * sums[i];
                    _Pragma("omp simd") for (long c = 0; c < e; c++)
                        result[c] += query[i] * state[i * e + c];
                }
                for (long c = 0; c < e; c++) result[c] /= total + eps;
            }
        }
}

/* ``branches``: of 3x3, 3x1 and 1x3, each kernel, mean, variance, weight, bias. ``merged``: nine
   taps and the bias, channels side by side. */
void branch_conv(const float *x, const float *const *branches, float eps, float *merged,
                 const float *added, float *out, long b, long h, long w, long c) {
    const long firsts[] = {0, 1, 3}, steps[] = {1, 3, 1}, taps[] = {9, 3, 3};
    for (long i = 0; i < 10 * c; i++) merged[i] = 0;
    for (long k = 0; k < 3; k++, branches += 5)
        for (long i = 0; i < c; i++) {
            float scale = branches[3][i] / sqrtf(branches[2][i] + eps);
            for (long t = 0; t < taps[k]; t++)
                merged[(firsts[k] + t * steps[k]) * c + i] += branches[0][i * taps[k] + t] * scale;
            merged[9 * c + i] += branches[4][i] - branches[1][i] * scale;
        }
    for (long place = 0; place < b * h * w; place++, out += c) {
        long row = place / w % h, column = place % w;
        for (long i = 0; i < c; i++)
            out[i] = merged[9 * c + i] + (added ? added[place * c + i] : 0);
        for (long t = 0; t < 9; t++) {
            long down = t / 3 - 1, right = t % 3 - 1;
            if (row + down < 0 || row + down >= h || column + right < 0 || column + right >= w)
                continue;
            const float *near = x + (place + down * w + right) * c, *tap = merged + t * c;
            _Pragma("omp simd") for (long i = 0; i < c; i++) out[i] += near[i] * tap[i];
        }
    }
}
"""

_FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
_FLAGS += ["-shared", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # a third faster than the compiler's own choice


def _key(source: str, compiler: list[str]) -> bytes:
    """What a build depends on: the code is for this very processor, a home may serve several."""
    cpu, flags = Path("/proc/cpuinfo"), []
    if cpu.exists():
        lines = cpu.read_text(errors="replace").splitlines()
        flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    key = "\n".join([source, *compiler, *_FLAGS, platform.machine(), *flags])
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _is_mine(descriptor: int) -> bool:
    """Whether nobody else can write to this file or folder, root aside."""
    state = os.fstat(descriptor)
    return state.st_uid == os.getuid() and not state.st_mode & 0o022


def _open_cache() -> int | None:
    """A descriptor of the user's cache folder, or None where it is missing or open to others."""
    try:
        base = os.environ.get("XDG_CACHE_HOME", "")
        home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
        if not home.is_absolute():  # it would be code of whatever folder this runs in
            return None
        home.mkdir(parents=True, exist_ok=True)
        folder = home / "attnzoo"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, RuntimeError, AttributeError):  # no such flags where there is no such cache
        return None
    try:
        if _is_mine(descriptor):
            os.fchmod(descriptor, 0o700)
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _read(cache: int, name: str, key: bytes) -> bytes | None:
    """The library in the cache, or None unless it is whole and this user's own."""
    try:
        # Not blocking, in case it is a pipe.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(name, flags, dir_fd=cache), "rb") as file:
            data = file.read() if _is_mine(file.fileno()) else b""
    except OSError:
        return None
    code, digest = data[:-32], data[-32:]
    return code if digest == hashlib.sha256(key + code).digest() else None


def _write(cache: int, name: str, key: bytes, code: bytes) -> None:
    """Puts a library into the cache, whole or not at all; a loader ignores what follows it."""
    part = f"{name}.{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):  # it is built again next time
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with open(os.open(part, flags, 0o600, dir_fd=cache), "wb") as file:
                file.write(code + hashlib.sha256(key + code).digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, name, src_dir_fd=cache, dst_dir_fd=cache)
        except BaseException:
            os.unlink(part, dir_fd=cache)
            raise


def _build(source: str, compiler: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        code, target = Path(folder, "power_map.c"), Path(folder, "power_map.so")
        code.write_text(source, encoding="ascii")
        command = [*compiler, *_FLAGS, str(code), "-o", str(target), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return target.read_bytes()


def _load(code: bytes) -> ctypes.CDLL:
    """Loads a library from memory, where nothing can truncate or exchange it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("attnzoo-power-map")
        with open(descriptor, "wb", closefd=False) as file:
            file.write(code)
        # Stays open: a loader takes a second library of one path for the first.
        return ctypes.CDLL(f"/proc/{os.getpid()}/fd/{descriptor}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "power_map.so")
        path.write_bytes(code)
        return ctypes.CDLL(str(path))


def _find() -> ctypes.CDLL:
    source = _SOURCE.replace("KERNEL", _KERNEL)
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    key = _key(source, compiler)
    name = f"power_map-{key.hex()[:16]}.so"
    cache = _open_cache()
    if cache is None:
        return _load(_build(source, compiler))
    try:
        code = _read(cache, name, key)
        if code is None:
            code = _build(source, compiler)
            _write(cache, name, key, code)
    finally:
        os.close(cache)
    return _load(code)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where, with a warning, they could not be built."""
    try:
        return _find()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode(errors="replace")
        reason = (said.decode(errors="replace").strip().splitlines() or [type(error).__name__])[0]
        warnings.warn_explicit(
            f"the power map runs by torch's operators, slower, because its C kernel could not be "
            f"built ({reason}); set ATTNZOO_NATIVE=0 to be spared this warning",
            RuntimeWarning, "attnzoo", 0,
        )  # fmt: skip
        return None
