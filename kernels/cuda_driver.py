"""Loads and launches machine code on an NVIDIA GPU through libcuda, by ctypes, in the context that torch made. Needs no CUDA
toolkit."""

import ctypes
import threading

INVALID_CONTEXT = 201
MOST_WORDS = 16  # the largest number of parameters of a kernel


class Parameters(threading.local):
    """Memory for the parameters of a launch. The driver copies them, so a thread can use it again: making it takes 3 us."""

    def __init__(self):
        self.values = (ctypes.c_uint64 * MOST_WORDS)()
        first = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * MOST_WORDS)(*range(first, first + 8 * MOST_WORDS, 8))


class Driver:
    """The CUDA driver library. Raises OSError if `path` cannot be loaded."""

    def __init__(self, path="libcuda.so.1"):
        self._library = ctypes.CDLL(str(path))
        self._parameters = Parameters()

    def load(self, image, names, device_index=0):
        """{name: handle} of the kernels `names` in `image`, a cubin, on that device. All are loaded at once: none may have to be
        loaded later, while a CUDA graph is captured."""
        module = ctypes.c_void_p()
        self._in_context(device_index, self._library.cuModuleLoadData, ctypes.byref(module), image, what="a cubin")
        functions = {}
        for name in names:
            handle = ctypes.c_void_p()
            error = self._library.cuModuleGetFunction(ctypes.byref(handle), module, name.encode())
            self._check(error, f"kernel {name}")
            functions[name] = handle
        return functions

    def launch(self, function, blocks, threads, stream, words, device_index=0):
        """Queue a function of load() with `blocks` x `threads` threads on a stream, given as a raw pointer.
        words: the parameters, each a pointer or whole number of 8 bytes."""
        parameters = self._parameters
        parameters.values[: len(words)] = words
        # Without argtypes: ctypes passes whole numbers as C ints, and a call takes 0.5 us instead of 4.
        shape = blocks, 1, 1, threads, 1, 1, 0
        arguments = function, *shape, ctypes.c_void_p(stream), parameters.pointers, None
        if self._library.cuLaunchKernel(*arguments):
            what = f"a launch of {blocks} x {threads} threads"
            self._in_context(device_index, self._library.cuLaunchKernel, *arguments, what=what)

    def _in_context(self, device_index, call, *arguments, what):
        """call(*arguments). If this thread has no CUDA context yet, torch's is made current and the call is repeated."""
        error = call(*arguments)
        if error == INVALID_CONTEXT:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._check(self._library.cuDeviceGet(ctypes.byref(device), device_index), "cuDeviceGet")
            retain = self._library.cuDevicePrimaryCtxRetain
            self._check(retain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
            self._check(self._library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
            error = call(*arguments)
        self._check(error, what)

    def _check(self, error, what):
        if error:
            message = ctypes.c_char_p()
            self._library.cuGetErrorString(error, ctypes.byref(message))
            raise RuntimeError(f"{what}: CUDA error {error}, {(message.value or b'unknown').decode()}")
