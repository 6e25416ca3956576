"""Compiles every Triton kernel for an H100 or H200, without a GPU: run by test_triton.py in a process of its own.

Each op runs on CPU tensors with the launch replaced by a compilation for the arguments of that launch. Prints one line
for each specialisation compiled.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from stablevelocity_kernels.ops._register import triton_implementation

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
done = set()


def launch_as_compilation(kernel, grid):
    def launch(*args, num_warps, **constants):
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        signature, constexprs, attributes = {}, {}, {}
        for i, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif parameter.is_constexpr or value == 1:  # Triton makes a constant of an integer 1
                signature[parameter.name] = "constexpr"
                constexprs[(i,)] = value
            else:
                signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        key = kernel.__name__, str(signature), str(constexprs), num_warps
        if key not in done:
            done.add(key)
            source = ASTSource(kernel, signature, constexprs, attributes)
            compiled = compile(source, target=HOPPER, options={"num_warps": num_warps})
            print(kernel.__name__, len(compiled.asm["ptx"]))

    return launch


def run(op, *args, **kwargs):
    triton_implementation(op)(*args, **kwargs)


def main():
    JITFunction.__getitem__ = launch_as_compilation
    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    half, labels, counts = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.int32)
    for d, x_dtype, refs_dtype in ((1, f32, f16), (4096, bf16, f16), (16384, f32, bf16), (16384, f64, f32)):
        x, refs = torch.zeros(2, d, dtype=x_dtype), torch.zeros(3, 20, d, dtype=refs_dtype)
        run("stable_target", x, refs, half, labels, counts, x)
        run("posterior_mean", x, refs[0], half, half)
    for d in (4096, 5000):  # one row, one reference: every integer that can be 1 is
        run("posterior_mean", torch.zeros(1, d), torch.zeros(1, 1, d), half[:1], half[:1], labels[:1], counts[:1])
    for dtype in (f16, bf16, f32, f64):
        x, features = torch.zeros(2, 2000, dtype=dtype), torch.zeros(2, 3, 768, dtype=dtype)
        run("affine_step", x, x, half, half.double()[0], half, x.half(), x)
        run("va_repa_loss", features, features.half(), half)
        run("va_repa_loss_backward", half[0], features, features.half(), half)
        run("bank_push_", torch.zeros(3, 4, 5, dtype=dtype), counts, counts, torch.zeros(2, 5, dtype=f64), labels)
        rows = torch.zeros(2, 3000, dtype=dtype)
        run("bank_draw", torch.zeros(3, 4, 3000, dtype=dtype), counts, half, labels, rows, rows.half(), half)
        run("conditional_target_", rows, rows.half(), rows.float(), half, half.double())
    run("bank_draw", torch.zeros(1, 1, 1), counts[:1].long(), half[:1].double())
    run("affine_step", x[:1, :3], x[:1, :3], half[:1], half[0])
    run("va_repa_loss", torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), half[:1])
    run("bank_push_", torch.zeros(1, 1, dtype=torch.int64), counts[:1], counts[:1], labels[:1], labels[:1])


if __name__ == "__main__":
    main()
