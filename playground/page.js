// The page: controls, the address, the timeline. What is computed is computed in worker.js.

import { Board } from './board.js'
import { falseColours, digits, toTensor } from './pixels.js'
import { Generator } from './random.js'
import { FIELDS, asPython, readAddress, toAddress, toBase64, writeHash } from './settings.js'
import { Tokenizer } from './tokenizer.js'
import { anyPrompt, remarks } from './words.js'

const $ = id => document.getElementById(id)
const megabytes = bytes => `${(bytes / 1e6).toFixed(1)} MB`
const NOTES = { ddim: 'DDIM', ddpm: 'DDPM: fresh noise', euler_a: 'Euler ancestral: fresh noise', 'dpm++': 'DPM-Solver++',
  x0: 'x̂₀, the picture in it', xt: 'xₜ, what it sees' }
const SUGGESTIONS = { digits: ['7', '2025', '0123', '88'], scenes: ['a bold red seven above a blue 3', 'un sette rosso sopra un 3 blu',
  'a thin white zero left of a pink 8', 'uno zero giallo spesso', 'a green 2 below a thin orange nine'] }

let { settings, step, complaints } = readAddress(location)  // step: where the timeline stands, 0: at its end
const { mode } = settings, fields = FIELDS[mode]
let model, tokenizer, stored             // what the build wrote down of this mode's model; whether it is here already
let worker, ready = false, wish = 0      // the number of the newest wish
let frames = [], shown                   // of that wish
let spoiled = ''                         // what is wrong with a control's value

// ---- pictures

function put(canvas, { width, height, data }) {
  canvas.width = width
  canvas.height = height
  canvas.getContext('2d').putImageData(new ImageData(data, width, height), 0, 0)
}

// What will be denoised, before anything is loaded
function preview() {
  const noise = new Generator(settings.seed).randn(mode == 'digits' ? 784 * settings.prompt.length : 256)
  put($('picture'), (mode == 'digits' ? digits : falseColours)(noise))
  $('picture').setAttribute('aria-label', `Noise of seed ${settings.seed}: the picture is not drawn yet`)
}

function show(place) {  // a step, from 1
  shown = frames[place - 1]
  for (const name of ['picture', 'xt', 'x0', 'eps']) put($(name), shown[name])
  const [signal, noise] = shown.rates.map(x => x.toFixed(2))
  $('step').value = place
  $('place').textContent = `step ${place} of ${shown.of}, t = ${shown.t}`
  $('step').setAttribute('aria-valuetext', $('place').textContent)
  $('equation').innerHTML = `<span class="xt">x<sub>t</sub></span> = ${signal} · <span class="x0">x̂<sub>0</sub></span> + ` +
    `${noise} · <span class="eps">ε̂</span>`
  $('picture').setAttribute('aria-label', `What “${settings.prompt}” looks like at ${$('place').textContent}`)
}

// Some steps side by side, above the timeline
function film({ i, of, picture }) {
  const count = Math.min(of, picture.width > picture.height ? 5 : 10), { width, height } = picture, canvas = $('film')
  if (i == 0) Object.assign(canvas, { width: count * width, height })
  for (let k = 0; k < count; k++) if (Math.round(k * (of - 1) / Math.max(1, count - 1)) == i)
    canvas.getContext('2d').putImageData(new ImageData(picture.data, width, height), k * width, 0)
}

// ---- the worker

function receive({ data }) {
  if (data.loaded) {
    $('progress').value += data.loaded
    $('load').textContent = `${megabytes($('progress').value)} of ${megabytes($('progress').max)}`
  } else if (data.ready) {
    ready = true
    $('gate').hidden = true
    draw()
  } else if (data.id === undefined) giveUp(data.failed)
  else if (data.id != wish) return
  else if (data.failed) stop(data.failed)
  else if (data.seconds !== undefined) finish(data.seconds)
  else {
    if (data.i == 0) begin(data)
    frames.push(data)
    film(data)
    if (!step || step == frames.length) show(frames.length)
  }
}

function begin({ of }) {
  pause()
  frames = []
  $('time').hidden = false
  $('step').max = of
  $('reuse').disabled = $('save').disabled = false
}

function finish(seconds) {
  if (step > frames.length) show(frames.length)
  stop(`${frames.length} ${frames.length > 1 ? 'steps' : 'step'} in ${seconds.toFixed(1)} s, here in your browser.`)
}

function stop(text) {
  $('stage').ariaBusy = 'false'
  say(text)
}

function giveUp(why) {
  worker.terminate()
  worker = undefined
  $('progress').hidden = true
  $('load').disabled = false
  $('load').textContent = 'Try again'
  say(why)
}

async function load() {
  $('load').disabled = true
  Object.assign($('progress'), { hidden: false, value: 0, max: model.bytes })
  say('')
  await Promise.race([kept, new Promise(resolve => setTimeout(resolve, 2000))])
  worker = new Worker('worker.js', { type: 'module' })
  worker.onmessage = receive
  worker.onerror = event => giveUp(`The model could not be started: ${event.message ?? 'worker.js was not loaded'}`)
  worker.postMessage({ load: model })
}

function draw() {
  wish++
  pause()
  if (!ready) return preview()
  Object.assign($('stage'), { ariaBusy: 'true' }).dataset.wish = wish
  const image = settings.image && toTensor(board.pixels)
  worker.postMessage({ id: wish, settings: { ...settings, image } })
}

// ---- settings, and where they are shown

const say = text => { $('status').textContent = text }

function changed(stay = 0) {
  complaints = []
  step = stay
  tell()
  draw()
  remember()
}

// The address follows, not faster than browsers allow
let writing
function remember() {
  clearTimeout(writing)
  writing = setTimeout(write, 200)
}
function write() {
  clearTimeout(writing)
  history.replaceState(null, '', location.pathname + writeHash(settings, step))
}

// All that depends on the settings and is no picture
function tell() {
  const { guidance, image } = settings
  for (const name of ['guidance', 'steps', 'strength']) if (fields[name]) $(`${name}-value`).textContent = settings[name]
  $('guidance-note').textContent = guidance == 0 ? `At 0 the ${mode == 'digits' ? 'digit' : 'prompt'} does not count.` :
    guidance == 1 ? 'At 1 all is as it was learned.' : guidance < 1 ? 'Less than was learned.' : 'Above 1 it obeys more, and varies less.'
  const said = [...complaints, ...spoiled ? [spoiled] : [], ...mode == 'scenes' ?
    remarks(model.grammar, tokenizer, `${settings.prompt} ${settings.negative}`) : []]
  $('remarks').replaceChildren(...said.map(text => Object.assign(document.createElement('li'), { textContent: text })))
  $('lines').textContent = asPython(settings)
  if (!worker) $('load').textContent = stored ? 'Start: the model is stored here' :
    `Load the model: ${megabytes(model.bytes + (image ? model.files.vae_encoder.bytes : 0))}`
  $('start').hidden = !image
  $(image ? 'from-picture' : 'from-noise').checked = true
}

function set(values) {
  Object.assign(settings, values)
  for (const name of Object.keys(values)) if ($(name)?.matches('input, select')) $(name).value = values[name]
  spoiled = ''
  changed()
}

// ---- the timeline

let playing
function pause() {
  clearInterval(playing)
  playing = undefined
  $('play').textContent = '▶'
  $('play').ariaLabel = 'Play the steps'
}

function play() {
  if (playing) return pause()
  let place = Number($('step').value) % frames.length
  $('play').textContent = '⏸'
  $('play').ariaLabel = 'Pause'
  playing = setInterval(() => {
    look(++place)
    if (place == frames.length) pause()
  }, Math.max(80, 2500 / frames.length))
}

// The visitor looks at a step, which the address remembers
function look(place) {
  step = place == frames.length ? 0 : place
  show(place)
  remember()
}

// ---- the board

const board = new Board($('board'), $('cursor'), useBoard)
function useBoard() {
  settings.image = toAddress(board.base64)
  changed()
}

// Show a picture on the board; raises an Error that says what was wrong
async function showOnBoard(source, name) {
  const image = new Image()
  image.src = source
  await image.decode().catch(() => { throw new Error(`${name} is no picture that this browser can read.`) })
  board.show(image, image.naturalWidth, image.naturalHeight)
}

async function openFile() {
  const [file] = $('file').files, address = URL.createObjectURL(file)
  await showOnBoard(address, file.name).then(useBoard, e => say(e.message))
  URL.revokeObjectURL(address)
  $('file').value = ''
}

function setUpBoard() {
  const inks = { ...model.grammar.inks, black: [0, 0, 0] }
  $('inks').append(...Object.entries(inks).map(([name, rgb]) => {
    const label = document.createElement('label'), radio = document.createElement('input'), colour = `rgb(${rgb})`
    Object.assign(radio, { type: 'radio', name: 'ink', value: name, checked: name == 'white', ariaLabel: name })
    radio.addEventListener('input', () => { board.ink = colour })
    label.style.background = colour
    label.title = name
    label.append(radio)
    return label
  }))
  $('more').textContent = `(loads ${megabytes(model.files.vae_encoder.bytes)} more)`
  $('from-noise').addEventListener('input', () => { settings.image = ''; changed() })
  $('from-picture').addEventListener('input', useBoard)
  $('clear').addEventListener('click', () => { board.fill(); useBoard() })
  $('reuse').addEventListener('click', () => { board.show($('picture')); useBoard() })
  $('file').addEventListener('change', openFile)
  $('pen').addEventListener('click', () => {
    board.bold = !board.bold
    $('pen').setAttribute('aria-pressed', board.bold)
  })
}

// ---- start

function setUpFields() {
  for (const [name, field] of Object.entries(fields)) {
    const control = $(name)
    if (!control) continue
    if (control.matches('select')) control.append(...field.allowed.split(', ').map(value => new Option(NOTES[value], value)))
    if (field.max !== undefined) Object.assign(control, { min: field.min, max: field.max, step: field.step })
    control.addEventListener('input', () => {
      const value = field.read(control.value)
      spoiled = value === undefined ? `${JSON.stringify(control.value)} cannot be used; allowed: ${field.allowed}.` : ''
      if (value === undefined) tell()
      else { settings[name] = value; changed(name == 'view' ? step : 0) }
    })
  }
}

function setUpWords() {
  $('suggestions').append(...SUGGESTIONS[mode].map(prompt => {
    const chip = Object.assign(document.createElement('button'), { type: 'button', textContent: prompt })
    chip.addEventListener('click', () => set({ prompt }))
    return chip
  }))
  if (mode == 'digits') return
  const { inks, strokes, relations, digits, italian } = model.grammar
  const both = words => words.map(word => `${word}, ${italian[word]}`).join(' · ')
  const rows = { Digits: digits.en.map((word, i) => [...new Set([i, word, digits.it[i]])].join(', ')).join(' · '),
    Inks: both(Object.keys(inks)), Pens: both(strokes), Places: both(relations),
    Weights: '(red:1.5) counts one and a half times, as in lesson 11' }
  for (const [name, text] of Object.entries(rows)) $('grammar').append(
    Object.assign(document.createElement('dt'), { textContent: name }), Object.assign(document.createElement('dd'), { textContent: text }))
}

function setUpButtons() {
  const clicks = { load, play, code: () => copy($('lines').textContent, 'The lines of Python are copied.'),
    link: () => { write(); copy(location.href, 'The link is copied: it reproduces exactly this picture.') },
    dice: () => set({ seed: Math.floor(Math.random() * 2 ** 32) }),
    another: () => set({ prompt: mode == 'digits' ? String(Math.floor(Math.random() * 10000)) : anyPrompt(model.grammar) }),
    save: () => $('picture').toBlob(blob => {
      const link = Object.assign(document.createElement('a'), { href: URL.createObjectURL(blob), download: mode == 'digits' ? 'digits.png' : 'scene.png' })
      link.click()
      setTimeout(() => URL.revokeObjectURL(link.href), 1000)
    }) }
  for (const [id, click] of Object.entries(clicks)) $(id).addEventListener('click', click)
  $('step').addEventListener('input', () => look(Math.min(Number($('step').value), frames.length)))
}

async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text)
    say(done)
  } catch { say('This browser lets no page copy: take the link from the address bar, the Python from below the settings.') }
}

// Take everything from the address; also when a visitor changes it by hand
async function restore() {
  ({ settings, step, complaints } = readAddress(location))
  if (settings.mode != mode) return location.reload()
  for (const name of Object.keys(fields)) if ($(name)) $(name).value = settings[name]
  if (settings.image) await showOnBoard(`data:image/png;base64,${toBase64(settings.image)}`, 'The image in the address').catch(e => {
    complaints.push(e.message)
    settings.image = ''
  })
  tell()
  draw()
}

async function start() {
  const needed = { WebAssembly: window.WebAssembly, workers: window.Worker, DecompressionStream: window.DecompressionStream }
  const missing = Object.keys(needed).filter(name => !needed[name])
  if (missing.length) throw new Error(`This browser has no ${missing.join(', no ')}, and without that no model can run here. ` +
    'Current versions of Chrome, Edge, Firefox and Safari have it.')
  const answer = await fetch('model.json')
  if (!answer.ok) throw new Error(`model.json could not be loaded: the server answered ${answer.status}.`)
  model = (await answer.json())[mode]
  if (model.vocab) tokenizer = new Tokenizer(model)
  document.body.dataset.mode = mode
  document.querySelector(`nav [href$=${mode}]`).ariaCurrent = 'page'
  $('unable').remove()
  document.querySelector('.bench').hidden = false
  setUpFields()
  setUpWords()
  setUpButtons()
  if (mode == 'scenes') setUpBoard()
  stored = await window.caches?.match(new URL(model.files.unet.url, location))
  addEventListener('hashchange', restore)
  await restore()
}

// Whether the page is kept for use offline: see sw.js
const kept = new Promise(resolve => {
  const { serviceWorker } = navigator
  if (!serviceWorker || serviceWorker.controller) resolve()
  serviceWorker?.addEventListener('controllerchange', resolve)
  serviceWorker?.register('sw.js').catch(resolve)
})

start().catch(e => { $('unable').textContent = e.message })
