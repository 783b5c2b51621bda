// All that a picture depends on; as the address of the page, which reproduces it; and as Python, which does so too.

const number = (value, min, max, step) => ({ value, min, max, step,
  read: text => text.trim() && Number(text) >= min && Number(text) <= max && (step < 1 || Number.isInteger(Number(text))) ?
    Number(text) : undefined, allowed: `${step < 1 ? 'a number' : 'a whole number'} from ${min} to ${max}` })
const choice = (...names) => ({ value: names[0], read: text => names.includes(text) ? text : undefined, allowed: names.join(', ') })
const text = (value, pattern = /^/, allowed = 'a text') => ({ value, read: t => pattern.test(t) ? t : undefined, allowed })

export const FIELDS = {
  scenes: { prompt: text('a bold red seven above a blue 3'), negative: text(''), guidance: number(4, 0, 12, .5),
    steps: number(25, 1, 50, 1), scheduler: choice('ddim', 'euler_a', 'dpm++'), seed: number(0, 0, 2 ** 32 - 1, 1),
    view: choice('x0', 'xt'), strength: number(.8, .05, 1, .05), image: text('', /^[\w-]*$/, 'a PNG file in base64url') },
  digits: { prompt: text('7', /^\d{1,4}$/, 'one to four digits'), guidance: number(1.5, 0, 6, .1), steps: number(25, 1, 50, 1),
    scheduler: choice('ddim', 'ddpm', 'euler_a', 'dpm++'), seed: number(0, 0, 2 ** 32 - 1, 1),
    view: choice('x0', 'xt') },
}

// Settings of an address's search and hash, and complaints about what is not allowed there
export function readAddress({ search, hash }) {
  const given = { ...Object.fromEntries(new URLSearchParams(search)), ...Object.fromEntries(new URLSearchParams(hash.slice(1))) }
  const complaints = []
  const read = (name, field) => {
    if (given[name] === undefined) return field.value
    const value = field.read(given[name])
    if (value === undefined) complaints.push(`The address asks for ${name} ${JSON.stringify(given[name].slice(0, 40))}; ` +
      `allowed: ${field.allowed}. It is ${JSON.stringify(field.value)} now.`)
    return value ?? field.value
  }
  const mode = read('mode', choice('scenes', 'digits'))
  const settings = { mode, ...Object.fromEntries(Object.entries(FIELDS[mode]).map(([name, field]) => [name, read(name, field)])) }
  return { settings, step: read('step', number(0, 0, 50, 1)), complaints }
}

// The hash that reproduces a picture; `step` is where the timeline stands, 0: at its end
export function writeHash(settings, step = 0) {
  const kept = Object.entries({ ...settings, step }).filter(([name, value]) => value !== '' && !(name == 'step' && !value) &&
    !(name == 'strength' && !settings.image))
  return '#' + new URLSearchParams(kept)
}

// Base64 as addresses may hold it, and back
export const toAddress = base64 => base64.replaceAll('+', '-').replaceAll('/', '_').replace(/=+$/, '')
export const toBase64 = text => text.replaceAll('-', '+').replaceAll('_', '/') + '='.repeat(-text.length & 3)

// Lines of Python that draw the same picture
export function asPython(settings) {
  return settings.mode == 'digits' ? digitsInPython(settings) : sceneInPython(settings)
}

const float = x => Number.isInteger(x) ? `${x}.0` : String(x)

function digitsInPython({ prompt, guidance, steps, scheduler, seed }) {
  const later = ['euler_a', 'dpm++'].includes(scheduler)
  return ['import torch', `from sdcourse.digits import ${later ? 'SCHEDULER, ' : ''}sample`, 'from sdcourse.images import to_pil',
    ...later ? ['from sdcourse.schedulers import make_scheduler'] : [], '',
    `digits = sample([${[...prompt].join(', ')}], num_inference_steps=${steps}, guidance_scale=${float(guidance)},`,
    `                generator=torch.Generator().manual_seed(${seed}),`,
    `                scheduler=${later ? `make_scheduler('${scheduler}', **SCHEDULER)` : `'${scheduler}'`})`,
    "to_pil(torch.cat(list(digits), dim=2)).save('digits.png')", ''].join('\n')
}

function sceneInPython({ prompt, negative, guidance, steps, scheduler, seed, strength, image }) {
  const lines = ['import torch', 'from sdcourse.pipeline import StableDiffusionPipeline']
  if (image) lines.unshift('from base64 import b64decode', 'from io import BytesIO', 'from PIL import Image')
  if (scheduler != 'ddim') lines.push('from sdcourse.schedulers import make_scheduler')
  lines.push('', "pipe = StableDiffusionPipeline.from_pretrained('scenes')")
  if (scheduler != 'ddim') lines.push(`pipe.scheduler = make_scheduler('${scheduler}', **pipe.scheduler.config)`)
  if (image) lines.push(`image = Image.open(BytesIO(b64decode('${toBase64(image)}')))`)
  const more = [negative && `negative_prompt=${JSON.stringify(negative)}`, image && `image=image, strength=${float(strength)}`,
    `num_inference_steps=${steps}, guidance_scale=${float(guidance)}`, `generator=torch.Generator().manual_seed(${seed})`]
  return [...lines, `done = pipe(${[JSON.stringify(prompt), ...more.filter(Boolean)].join(',\n            ')})`,
    "done.images[0].save('scene.png')", ''].join('\n')
}
