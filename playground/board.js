// A board of 64×64 pixels to draw on, by mouse, finger or keyboard.

const SIDE = 64

export class Board {
  ink = '#fff'
  bold = false
  constructor(canvas, cursor, changed) {
    Object.assign(this, { canvas, cursor, changed, x: SIDE / 2, y: SIDE / 2, down: false })
    this.pen = canvas.getContext('2d', { alpha: false, willReadFrequently: true })
    Object.assign(this.pen, { lineCap: 'round', lineJoin: 'round', imageSmoothingQuality: 'high' })
    this.fill()
    canvas.addEventListener('pointerdown', event => {
      canvas.setPointerCapture(event.pointerId)
      this.down = false
      this.move(...this.place(event))
      this.down = true
      this.move(this.x, this.y)
    })
    canvas.addEventListener('pointermove', event => { if (event.buttons) this.move(...this.place(event)) })
    for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { this.down = false })
    canvas.addEventListener('keydown', event => this.type(event))
    canvas.addEventListener('focus', () => this.follow(canvas.matches(':focus-visible')))
    canvas.addEventListener('blur', () => { this.down = false; this.follow(false) })
  }

  place({ clientX, clientY }) {
    const { left, top, width } = this.canvas.getBoundingClientRect()
    return [clientX - left, clientY - top].map(x => Math.min(SIDE, Math.max(0, x * SIDE / width)))
  }

  // Arrow keys move the pen, Space puts it down or lifts it
  type(event) {
    const way = { ArrowLeft: [-2, 0], ArrowRight: [2, 0], ArrowUp: [0, -2], ArrowDown: [0, 2] }[event.key]
    if (event.key == ' ') {
      this.down = !this.down
      this.move(this.x, this.y)
    } else if (way) this.move(...[this.x + way[0], this.y + way[1]].map(x => Math.min(SIDE, Math.max(0, x))))
    else return
    event.preventDefault()
    this.follow(true)
  }

  move(x, y) {
    if (this.down) {
      Object.assign(this.pen, { strokeStyle: this.ink, lineWidth: this.bold ? 6 : 3.5 })
      this.pen.beginPath()
      this.pen.moveTo(this.x, this.y)
      this.pen.lineTo(x, y)
      this.pen.stroke()
      this.changed()
    }
    Object.assign(this, { x, y })
  }

  // The mark that shows where the pen is while the keyboard leads it
  follow(visible) {
    this.cursor.hidden = !visible
    this.cursor.classList.toggle('down', this.down)
    Object.assign(this.cursor.style, { left: `${100 * this.x / SIDE}%`, top: `${100 * this.y / SIDE}%` })
  }

  fill() {
    this.pen.fillStyle = '#000'
    this.pen.fillRect(0, 0, SIDE, SIDE)
  }

  // The largest square in the middle of a picture
  show(image, width = image.width, height = image.height) {
    const side = Math.min(width, height)
    this.fill()
    this.pen.drawImage(image, (width - side) / 2, (height - side) / 2, side, side, 0, 0, SIDE, SIDE)
  }

  get pixels() { return this.pen.getImageData(0, 0, SIDE, SIDE) }
  get base64() { return this.canvas.toDataURL('image/png').split(',')[1] }
}
