// What the scenes' prompts may say: the grammar of lesson 01, which the build writes down from Python.

const pick = (list, random) => list[Math.floor(random() * list.length)]

// A caption that lesson 01 could have written, in English or Italian
export function anyPrompt(grammar, random = Math.random) {
  const italian = random() < .5, say = word => italian ? grammar.italian[word] : word
  const thing = () => {
    const digit = Math.floor(random() * 10), ink = pick(Object.keys(grammar.inks), random)
    const number = random() < .5 ? String(digit) : grammar.digits[italian ? 'it' : 'en'][digit]
    const stroke = pick([...grammar.strokes, ''], random)
    if (italian) return [digit ? 'un' : 'uno', number, say(ink), stroke && say(stroke)].filter(Boolean).join(' ')
    const words = [stroke, ink, number].filter(Boolean).join(' ')
    return `${'aeiou'.includes(words[0]) ? 'an' : 'a'} ${words}`
  }
  return random() < 1 / 3 ? thing() : `${thing()} ${say(pick(grammar.relations, random))} ${thing()}`
}

// Words that were in none of the captions: they fall apart into letters or syllables
export function unknownWords(tokenizer, prompt) {
  const words = prompt.replace(/<\|(start|end)oftext\|>/giu, ' ').toLowerCase().match(/[\p{L}\p{Nl}\p{No}]+/gu) ?? []
  return [...new Set(words)].filter(word => tokenizer.tokenize(word).length > 1)
}

// What a visitor should know of a prompt, as sentences
export function remarks(grammar, tokenizer, prompt) {
  const said = unknownWords(tokenizer, prompt).map(word =>
    `“${word}” was in none of the captions that this model learned from: it reads ${tokenizer.tokenize(word)
      .map(token => token.replace('</w>', '')).join('·')}, which means nothing to it.`)
  const numbers = [...grammar.digits.en, ...grammar.digits.it], words = prompt.toLowerCase().match(/\p{L}+|\p{N}/gu) ?? []
  const digits = words.filter(word => numbers.includes(word) || /^\p{N}$/u.test(word))
  if (digits.length > 2) said.push(`It has only ever seen one digit or two in a picture; here are ${digits.length}.`)
  else if (!digits.length && prompt.trim() && !said.length) said.push('No digit is named, so it will choose one.')
  return said
}
