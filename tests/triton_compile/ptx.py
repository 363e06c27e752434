"""A few instructions of PTX, run by numpy for the 32 threads of one warp: what the tests of inline
PTX need, which Triton's interpreter leaves out. Anything else is an error."""

import re

import numpy as np
import torch

LANES = 32
INSTRUCTION = re.compile(r"(?<![\w.$%])([a-z]\w*(?:\.\w+)*)\s+([^;]+);")
FLOATS = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}


class Warp:
    """Runs a kernel's straight-line PTX on `buffers`, one numpy array of bytes a parameter."""

    def __init__(self, buffers: list[np.ndarray]):
        self.buffers = buffers
        self.registers = {"%tid.x": np.arange(LANES, dtype=np.uint64)}

    def run(self, ptx: str) -> None:
        body = ptx[ptx.index("\n{") : ptx.index("ret;")]
        body = re.sub(r"//.*|\.loc.*|\.reg[^;]*;", "", body)
        for opcode, operands in INSTRUCTION.findall(body):
            name, *kinds = opcode.split(".")
            vectors = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)
            getattr(self, f"do_{name}")(kinds, *vectors)

    def read(self, operand: str) -> np.ndarray:
        """uint64 [lanes]: a register, a constant, or two 16-bit registers side by side."""
        if operand.startswith("{"):
            low, high = map(self.read, split(operand))
            return low | high << np.uint64(16)
        if re.match(r"-?\d", operand):
            return np.full(LANES, int(operand, 0) % 2**64, dtype=np.uint64)
        return self.registers[operand]

    def write(self, operand: str, value: np.ndarray, bits: int = 64) -> None:
        self.registers[operand] = value & np.uint64(2**bits - 1)

    def do_mov(self, kinds, to, source):
        value = self.read(source)
        if not to.startswith("{"):
            self.write(to, value, 32)
            return
        for i, half in enumerate(split(to)):
            self.write(half, value >> np.uint64(16 * i), 16)

    def do_ld(self, kinds, to, address):
        if kinds[0] == "param":
            number = int(re.search(r"param_(\d+)", address)[1])
            self.write(to, np.full(LANES, number << 32, dtype=np.uint64))
            return
        for i, register in enumerate(split(to)):
            words, index = self.words(address, i)
            self.write(register, words[index].astype(np.uint64), 32)

    def do_st(self, kinds, address, source):
        for i, register in enumerate(split(source)):
            words, index = self.words(address, i)
            words[index] = self.read(register).astype(np.uint32)

    def words(self, address: str, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffer of `address` as 32-bit words, and which of them lanes mean by the i-th."""
        register, offset = re.match(r"\[\s*(\S+?)\s*(?:\+\s*(\d+)\s*)?\]", address).groups()
        value = self.read(register) + np.uint64(int(offset or 0) + 4 * i)
        (buffer,) = set((value >> np.uint64(32)).tolist())
        return self.buffers[buffer].view(np.uint32), (value & np.uint64(2**32 - 1)) // 4

    def do_shl(self, kinds, to, a, b):
        self.write(to, self.read(a) << self.read(b), 32)

    def do_shr(self, kinds, to, a, b):
        self.write(to, self.read(a) >> self.read(b), 32)

    def do_and(self, kinds, to, a, b):
        self.write(to, self.read(a) & self.read(b))

    def do_or(self, kinds, to, a, b):
        self.write(to, self.read(a) | self.read(b))

    def do_add(self, kinds, to, a, b):
        if kinds[-1] == "f32":
            self.do_fma(["rn", "f32"], to, a, "0f3F800000", b)
        else:
            self.write(to, self.read(a) + self.read(b))

    def do_cvt(self, kinds, to, a):
        assert kinds == ["u64", "u32"], kinds
        self.write(to, self.read(a))

    def do_mul(self, kinds, to, a, b):
        assert kinds == ["wide", "u32"], kinds
        self.write(to, self.read(a) * self.read(b))

    def do_mad(self, kinds, to, a, b, c):
        assert kinds == ["wide", "u32"], kinds
        self.write(to, self.read(a) * self.read(b) + self.read(c))

    def do_prmt(self, kinds, to, a, b, selector):
        """Byte i of the result is the one of b:a that digit i of the selector names."""
        both, digits = self.read(a) | self.read(b) << np.uint64(32), int(selector, 0)
        value = np.zeros(LANES, dtype=np.uint64)
        for i in range(4):
            digit = digits >> 4 * i & 15
            assert digit < 8, "a digit's high bit spreads the sign"
            value |= (both >> np.uint64(8 * digit) & np.uint64(255)) << np.uint64(8 * i)
        self.write(to, value)

    def do_lop3(self, kinds, to, a, b, c, table):
        """Bit 4 a + 2 b + c of the table, bit by bit."""
        a, b, c, table = self.read(a), self.read(b), self.read(c), int(table, 0)
        value = np.zeros(LANES, dtype=np.uint64)
        for bit in range(32):
            at = np.uint64(bit)
            one = np.uint64(1)
            index = (a >> at & one) * 4 + (b >> at & one) * 2 + (c >> at & one)
            value |= (np.uint64(table) >> index & one) << at
        self.write(to, value)

    def do_fma(self, kinds, to, *operands):
        assert kinds[0] == "rn", kinds
        if kinds[1] == "f32":
            a, b, c = (self.singles(operand) for operand in operands)
            self.write(to, (a * b + c).astype(np.float32).view(np.uint32).astype(np.uint64))
            return
        a, b, c = (self.floats(operand, FLOATS[kinds[1]]) for operand in operands)
        bits = (a * b + c).to(FLOATS[kinds[1]]).view(torch.uint16).numpy()
        low, high = bits.reshape(2, LANES).astype(np.uint64)
        self.write(to, low | high << np.uint64(16))

    def singles(self, operand: str) -> np.ndarray:
        """float64 [lanes] of a register's float32, or of a constant such as 0f3F800000."""
        if operand.startswith("0f"):
            operand = "0x" + operand[2:]
        return self.read(operand).astype(np.uint32).view(np.float32).astype(np.float64)

    def floats(self, operand: str, dtype: torch.dtype) -> torch.Tensor:
        """float64 [2 lanes]: the lower halves of the registers, then the upper ones."""
        value = self.read(operand)
        halves = np.concatenate([value, value >> np.uint64(16)]).astype(np.uint16)
        return torch.from_numpy(halves).view(dtype).double()


def split(vector: str) -> list[str]:
    return vector.strip("{} ").replace(" ", "").split(",")
