// Schedulers of lessons 06 and 10, for models that predict velocities and for steps that are spaced 'trailing'.
// A tensor is a Float32Array; `i` counts the steps of the plan from 0; `v` is what the model answered.

// The sum of each weight times its tensor
export function mix(weights, tensors) {
  return tensors[0].map((_, k) => tensors.reduce((sum, x, j) => sum + weights[j] * x[k], 0))
}

// The share of the signal that is left at each timestep (lesson 03), in float32 as torch has it
export function alphasCumprod({ beta_schedule, beta_start, beta_end, num_train_timesteps: T }) {
  const root = i => Math.sqrt(beta_start) + (Math.sqrt(beta_end) - Math.sqrt(beta_start)) * i / (T - 1)
  const f = u => Math.cos((u + .008) / 1.008 * Math.PI / 2) ** 2
  const betas = { scaled_linear: i => root(i) ** 2, squaredcos_cap_v2: i => Math.min(1 - f((i + 1) / T) / f(i / T), .999) }
  let product = 1
  return Float32Array.from({ length: T }, (_, i) => product *= 1 - Math.fround(betas[beta_schedule](i)))
}

// Python's round: halves go to the even number
const round = x => Math.abs(x % 1) == .5 ? 2 * Math.round(x / 2) : Math.round(x)

// What all share: a plan of n steps, and what the model's answers mean
class Scheduler {
  constructor(config, n) {
    const T = config.num_train_timesteps, stride = (T - T / n) - T  // as numpy's arange(T, 0, -T/n) computes it
    Object.assign(this, { config, T, n, abar: alphasCumprod(config) })
    this.timesteps = Array.from({ length: n }, (_, i) => round(T + i * stride) - 1)
  }
  get initNoiseSigma() { return 1 }                       // how strong the noise is that a picture begins with
  scale(x, i) { return x }                                // x as the model gets to see it
  rates(i) {                                              // of signal and noise in what it sees
    const abar = this.abar[this.timesteps[i]]
    return [Math.sqrt(abar), Math.sqrt(1 - abar)]
  }
  addNoise(x0, eps, i) { return mix(this.rates(i), [x0, eps]) }
  parts(seen, v, i) {                                     // the predicted picture and noise
    const [alpha, sigma] = this.rates(i)
    return { x0: mix([alpha, -sigma], [seen, v]), eps: mix([sigma, alpha], [seen, v]) }
  }
}

// DDIM (Song et al., 2020, equation 12): the two predictions are mixed again, with less noise
export class DDIM extends Scheduler {
  step(v, i, x) {
    const t = this.timesteps[i] - Math.floor(this.T / this.n), end = this.config.set_alpha_to_one === false ? this.abar[0] : 1
    const abar = t < 0 ? end : this.abar[t], { x0, eps } = this.parts(x, v, i)
    return mix([Math.sqrt(abar), Math.sqrt(1 - abar)], [x0, eps])
  }
}

// Lesson 06's own DDIM: the predicted picture is held in [-1, 1]; `eta` says how much noise is fresh
export class DigitsDDIM extends Scheduler {
  eta = 0
  constructor(config, n) {
    super(config, n)
    this.timesteps = Array.from({ length: n }, (_, i) => round(this.T - i * this.T / n) - 1)
  }
  parts(seen, v, i) {
    const [alpha, sigma] = this.rates(i), x0 = super.parts(seen, v, i).x0.map(x => Math.min(1, Math.max(-1, x)))
    return { x0, eps: mix([1 / sigma, -alpha / sigma], [seen, x0]) }
  }
  step(v, i, x, generator) {
    const last = i == this.n - 1, { x0, eps } = this.parts(x, v, i)
    const here = this.abar[this.timesteps[i]], there = last ? 1 : this.abar[this.timesteps[i + 1]]
    const variance = this.eta ** 2 * (1 - there) / (1 - here) * (1 - here / there)
    const next = mix([Math.sqrt(there), Math.sqrt(1 - there - variance)], [x0, eps])
    return this.eta && !last ? mix([1, Math.sqrt(variance)], [next, generator.randn(x.length)]) : next
  }
}

// The same with as much fresh noise as DDPM adds (Ho et al., 2020)
export class DigitsDDPM extends DigitsDDIM { eta = 1 }

// Solvers that count noise in sigmas, noise over signal; the last one is 0
class SigmaScheduler extends Scheduler {
  constructor(config, n) {
    super(config, n)
    this.sigmas = [...this.timesteps.map(t => Math.sqrt((1 - this.abar[t]) / this.abar[t])), 0]
  }
}

// Euler's method with fresh noise at each step (after k-diffusion, Crowson 2022). Its x is the picture plus sigma times noise
export class EulerAncestral extends SigmaScheduler {
  get initNoiseSigma() { return this.sigmas[0] }
  scale(x, i) { return mix([1 / Math.hypot(1, this.sigmas[i])], [x]) }
  addNoise(x0, eps, i) { return mix([1, this.sigmas[i]], [x0, eps]) }
  step(v, i, x, generator) {
    const sigma = this.sigmas[i], goal = this.sigmas[i + 1], { x0 } = this.parts(this.scale(x, i), v, i)
    const up = goal * Math.sqrt(1 - (goal / sigma) ** 2), down = goal ** 2 / sigma  // the square root of goal² - up²
    return mix([down / sigma, 1 - down / sigma, up], [x, x0, generator.randn(x.length)])
  }
}

// DPM-Solver++ of second order (Lu et al., 2022): along a line through the latest two predictions
export class DPMSolver extends SigmaScheduler {
  step(v, i, x) {
    const [before, sigma, goal] = [i - 1, i, i + 1].map(k => this.sigmas[k]), { x0 } = this.parts(x, v, i), old = this.old
    const h = Math.log(sigma / goal), alpha = 1 / Math.hypot(1, goal), ofX0 = -alpha * Math.expm1(-h)
    const ofX = goal / sigma * alpha * Math.hypot(1, sigma)
    this.old = x0
    if (!old || goal == 0) return mix([ofX, ofX0], [x, x0])
    const change = ofX0 / 2 * h / Math.log(before / sigma)
    return mix([ofX, ofX0 + change, -change], [x, x0, old])
  }
}
