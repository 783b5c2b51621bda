// Numbers as pictures: {width, height, data}, four bytes a pixel. A tensor is a Float32Array of values in [-1, 1], (c,h,w).

const byte = x => {  // lesson 00's to_pil: halves go to the even number
  const value = Math.min(255, Math.max(0, Math.fround(Math.fround(x + 1) * 127.5))), low = Math.floor(value)
  return value - low == .5 ? low + low % 2 : Math.round(value)
}

function picture(width, height, value) {  // value(place, channel) of each pixel
  const data = new Uint8ClampedArray(4 * width * height)
  for (let i = 0; i < width * height; i++) data.set([byte(value(i, 0)), byte(value(i, 1)), byte(value(i, 2)), 255], 4 * i)
  return { width, height, data }
}

// A colour picture (3,h,w), as wide as high
export function colours(x) {
  const n = x.length / 3, side = Math.sqrt(n)
  return picture(side, side, (i, c) => x[c * n + i])
}

// A latent (4,h,w) in lesson 00's false colours: its channels pull towards white, red, green and blue
export function falseColours(latent) {
  const n = latent.length / 4, side = Math.sqrt(n), mean = latent.reduce((a, b) => a + b, 0) / latent.length
  const std = Math.sqrt(latent.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (latent.length - 1)), span = 6 * Math.max(1, std)
  const at = (i, k) => latent[k * n + i]
  return picture(side, side, (i, c) => [0, 1, 2, 3].reduce((sum, k) => sum + (k == 0 || k == c + 1 ? 1 : -1) * at(i, k), 0) / span)
}

// Digits side by side, each folded as lesson 06 does it, (4,14,14)
export function digits(x) {
  const n = x.length / 784
  return picture(28 * n, 28, i => {
    const row = Math.floor(i / (28 * n)), column = i % 28, digit = Math.floor(i % (28 * n) / 28)
    return x[784 * digit + 196 * (2 * (row % 2) + column % 2) + 14 * (row >> 1) + (column >> 1)]
  })
}

// The other way: the pixels of a canvas as a tensor (3,h,w)
export function toTensor({ data }) {
  const n = data.length / 4
  return Float32Array.from({ length: 3 * n }, (_, k) => data[4 * (k % n) + Math.floor(k / n)] / 127.5 - 1)
}
