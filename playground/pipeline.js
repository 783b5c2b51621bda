// The loop of lessons 06 and 11: noise, predictions with guidance, steps. A model is an object of async functions
// on Float32Arrays (models.js makes one of ONNX files), with the options that the build wrote down.

import { Generator } from './random.js'
import { DDIM, DPMSolver, DigitsDDIM, DigitsDDPM, EulerAncestral, mix } from './schedulers.js'
import { tokenRows } from './tokenizer.js'

const SCHEDULERS = {
  scenes: { ddim: DDIM, euler_a: EulerAncestral, 'dpm++': DPMSolver },
  digits: { ddim: DigitsDDIM, ddpm: DigitsDDPM, euler_a: EulerAncestral, 'dpm++': DPMSolver },
}
const ANY = 10  // the class 'any digit'

const join = arrays => {
  const all = new Float32Array(arrays.reduce((n, x) => n + x.length, 0))
  arrays.reduce((place, x) => (all.set(x, place), place + x.length), 0)
  return all
}

// Steps from noise, or from a picture, to a picture: an async generator. Raises RangeError if there is nothing to do
export async function* denoise(model, settings) {
  const { mode, steps, seed, guidance } = settings, generator = new Generator(seed)
  const plan = new SCHEDULERS[mode][settings.scheduler](model.scheduler, steps)
  // what the model is told: without guidance once, else twice, first what the guidance leads away from
  const wishes = await (mode == 'digits' ? readDigits : readTexts)(model, settings)
  const told = guidance == 0 ? wishes.slice(0, 1) : guidance == 1 ? wishes.slice(1) : wishes
  let { x, begin } = await (settings.image ? fromImage : fromNoise)(model, settings, plan, generator)
  for (let i = begin; i < steps; i++) {
    const t = plan.timesteps[i], seen = plan.scale(x, i)
    const answer = await model.predict(join(told.map(() => seen)), t, told), half = answer.length / told.length
    const v = told.length == 1 ? answer :
      mix([1 - guidance, guidance], [answer.subarray(0, half), answer.subarray(half)])
    x = plan.step(v, i, x, generator)
    if (!x.every(Number.isFinite)) throw new RangeError(`step ${i + 1 - begin} left numbers that are not finite`)
    yield { i: i - begin, of: steps - begin, t, rates: plan.rates(i), seen, x, ...plan.parts(seen, v, i) }
  }
}

function fromNoise(model, { latents, prompt, mode }, plan, generator) {
  const n = model.size * (mode == 'digits' ? prompt.length : 1)
  return { x: mix([plan.initNoiseSigma], [latents ?? generator.randn(n)]), begin: 0 }
}

// A picture goes back to noise as far as `strength` says; random numbers are drawn in Python's order
async function fromImage(model, { image, steps, strength }, plan, generator) {
  const left = Math.trunc(steps * strength), begin = steps - left
  if (!left) throw new RangeError(`strength ${strength} of ${steps} steps leaves none; at least ${1 / steps} is needed`)
  const { mean, std } = await model.encode(image), drawn = generator.randn(mean.length)
  const known = mean.map((m, k) => (m + std[k] * drawn[k]) * model.scaling_factor)
  return { x: plan.addNoise(known, generator.randn(known.length), begin), begin }
}

const readDigits = (model, { prompt }) => [Array.from(prompt, () => ANY), Array.from(prompt, Number)]

// The vectors of both texts: [negative, prompt]. A weight moves a vector away from that of the empty text, or towards it
async function readTexts(model, { prompt, negative }) {
  const texts = ['', negative ?? '', prompt].map(text => tokenRows(model.tokenizer, text))
  const rows = Math.max(...texts.map(text => text.ids.length)), [blank] = texts, read = []
  for (const { ids, weights } of texts) {
    const fill = (list, empty) => [...list, ...Array(rows - list.length).fill(empty)]
    read.push({ vectors: await model.read(fill(ids, blank.ids[0])), weights: fill(weights, blank.weights[0]).flat() })
  }
  const [empty, ...both] = read
  return both.map(({ vectors, weights }) => {
    const width = vectors.length / weights.length
    return vectors.map((v, k) => {
      const weight = weights[Math.floor(k / width)]
      return weight == 1 ? v : empty.vectors[k] + weight * (v - empty.vectors[k])
    })
  })
}

// Latents to a picture, (3,64,64) in [-1, 1]
export async function decode(model, latents) {
  return (await model.decode(mix([1 / model.scaling_factor], [latents]))).map(x => Math.min(1, Math.max(-1, x)))
}
