"""Launches machine code on an NVIDIA GPU by ctypes over libcuda, on the context that torch made. No toolkit, no headers."""

import ctypes

INVALID_CONTEXT = 201


class Driver:
    """The CUDA driver library. Raises OSError where `path` cannot be loaded."""

    def __init__(self, path="libcuda.so.1"):
        self._library = ctypes.CDLL(str(path))
        pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
        self._launch = self._library.cuLaunchKernel
        self._launch.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]

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
            functions[name] = handle.value
        return functions

    def launch(self, function, blocks, threads, stream, words, device_index=0):
        """Start `blocks` x `threads` of a function from `load` on a stream, a raw pointer. Does not wait for it.
        words: the value of each parameter, a pointer or whole number; every one is 8 bytes wide.

        The arrays are made anew for each launch: the driver copies them, but kept ones could be written by a second thread
        before that."""
        count = len(words)
        values = (ctypes.c_uint64 * count)(*words)
        first = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        arguments = (function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        if self._launch(*arguments):
            self._in_context(device_index, self._launch, *arguments, what=f"a launch of {blocks} x {threads} threads")

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
