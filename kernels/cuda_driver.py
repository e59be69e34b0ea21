"""Launches machine code on an NVIDIA GPU by ctypes over libcuda, on the context that torch made. No toolkit, no headers."""

import ctypes
import threading

INVALID_CONTEXT = 201
MOST_WORDS = 16  # parameters of a kernel


class Parameters(threading.local):
    """Room for the parameters of a launch: the driver copies them, so a thread needs it once. Made anew it costs 3 us."""

    def __init__(self):
        self.values = (ctypes.c_uint64 * MOST_WORDS)()
        first = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * MOST_WORDS)(*range(first, first + 8 * MOST_WORDS, 8))


class Driver:
    """The CUDA driver library. Raises OSError where `path` cannot be loaded."""

    def __init__(self, path="libcuda.so.1"):
        self._library = ctypes.CDLL(str(path))
        self._parameters = Parameters()

    def load(self, image, names, device_index=0):
        """The functions {name: handle} of `image`, a cubin, on that device. All at once, so that none is fetched later,
        while a CUDA graph is captured."""
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
        """Start `blocks` x `threads` of a function from `load` on a stream, a raw pointer. Does not wait for it.
        words: the value of each parameter, a pointer or whole number; every one is 8 bytes wide."""
        parameters = self._parameters
        parameters.values[: len(words)] = words
        # ctypes passes whole numbers as C ints by itself; with argtypes the call takes 4 us instead of 0.5.
        shape = blocks, 1, 1, threads, 1, 1, 0
        arguments = function, *shape, ctypes.c_void_p(stream), parameters.pointers, None
        if self._library.cuLaunchKernel(*arguments):
            what = f"a launch of {blocks} x {threads} threads"
            self._in_context(device_index, self._library.cuLaunchKernel, *arguments, what=what)

    def _in_context(self, device_index, call, *arguments, what):
        """call(*arguments), and once more with torch's context made current if it was not: a new thread has none."""
        error = call(*arguments)
        if error == INVALID_CONTEXT:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._check(self._library.cuDeviceGet(ctypes.byref(device), device_index), "cuDeviceGet")
            self._check(
                self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain"
            )
            self._check(self._library.cuCtxSetCurrent(context), "cuCtxSetCurrent")
            error = call(*arguments)
        self._check(error, what)

    def _check(self, error, what):
        if error:
            message = ctypes.c_char_p()
            self._library.cuGetErrorString(error, ctypes.byref(message))
            raise RuntimeError(f"{what}: CUDA error {error}, {(message.value or b'unknown').decode()}")
