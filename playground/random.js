// torch's random numbers, so that a seed means the same noise here as in Python.

// The Mersenne Twister (Matsumoto and Nishimura, 1998), seeded as torch.Generator().manual_seed(seed) does
export class Generator {
  constructor(seed) {  // a whole number from 0 to 2³² - 1
    this.words = new Uint32Array(624)
    this.words[0] = seed
    for (let i = 1; i < 624; i++) {
      const last = this.words[i - 1]
      this.words[i] = Math.imul(last ^ (last >>> 30), 1812433253) + i
    }
    this.place = 624
  }

  // the next 32 random bits
  bits() {
    if (this.place == 624) this.twist()
    let y = this.words[this.place++]
    y ^= y >>> 11
    y ^= (y << 7) & 0x9d2c5680
    y ^= (y << 15) & 0xefc60000
    return (y ^ (y >>> 18)) >>> 0
  }

  twist() {
    const w = this.words
    for (let i = 0; i < 624; i++) {
      const y = (w[i] & 0x80000000) | (w[(i + 1) % 624] & 0x7fffffff)
      w[i] = w[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0)
    }
    this.place = 0
  }

  // n normal numbers, as torch.randn(n): Box and Muller (1958), eight pairs at a time.
  // torch begins with n uniform ones; where n is no multiple of 16, the last 16 are drawn anew.
  randn(n) {
    if (n < 16) throw new RangeError(`randn draws 16 numbers or more, as torch does for tensors of that size; got ${n}`)
    const uniform = () => (this.bits() & 0xffffff) / 2 ** 24
    const x = Float32Array.from({ length: n }, uniform)
    for (let i = 0; i + 16 <= n; i += 16) toNormal(x.subarray(i, i + 16))
    if (n % 16) {
      const end = x.subarray(n - 16)
      end.forEach((_, i) => { end[i] = uniform() })
      toNormal(end)
    }
    return x
  }
}

function toNormal(x) {
  for (let i = 0; i < 8; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - x[i])), angle = 2 * Math.PI * x[i + 8]
    x[i] = radius * Math.cos(angle)
    x[i + 8] = radius * Math.sin(angle)
  }
}
