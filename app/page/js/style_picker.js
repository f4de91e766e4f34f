// The list of styles, built in the DOM alone, since names and words come from strangers; of hundreds a few at a time.
// props.value is the mix {name: strength}; props.cards, .live, .limits and .page come from the server.
const cards = element.querySelector('.picker-cards')
const more = element.querySelector('.picker-more')
const filter = element.querySelector('.picker-filter')
const count = element.querySelector('.picker-count')
const rows = new Map() // by name: {card, on, strength, text}, and what it shows once it was shown: node, show()
let limit = props.page
const PARTS = ['down', 'mid', 'up']

function dial(label, set, small) {
  const limits = { min: props.limits[0], max: props.limits[1], step: 0.05 }
  const range = make('input', { type: 'range', ...limits, 'aria-label': label })
  const number = make('input', { type: 'number', ...limits, 'aria-label': label + ', as a number' })
  range.addEventListener('input', () => { number.value = range.value; set(Number(range.value)) })
  number.addEventListener('change', () => {
    const value = Math.min(limits.max, Math.max(limits.min, Number(number.value) || 0))
    number.value = range.value = value
    set(value)
  })
  const show = (value, mixed) => {
    range.value = value
    number.value = mixed ? '' : value
    number.placeholder = mixed ? 'parts' : ''
  }
  return { node: make('div', { class: small ? 'dial small' : 'dial' }, range, number), show }
}

let waiting = null
let sent = null // the mix that the page knows: made here, or come from Undo, a preset and the like
function send() {
  sent = props.value = Object.fromEntries([...rows].filter(([, row]) => row.on).map(([name, row]) => [name, row.strength]))
  recount()
  preview()
}

function preview() {
  if (!props.live) return
  waiting ??= setTimeout(() => { waiting = null; trigger('input') }, 120)
}

function recount() {
  const on = [...rows.values()].filter((row) => row.on).length
  count.textContent = `${on} of ${rows.size} on`
}

// a strength is a number, or {component: number}, or {component: {down, mid, up}}; what is left out is 1
function partOf(strength, component, part) {
  const of = typeof strength === 'object' ? strength[component] ?? 1 : strength
  return typeof of === 'object' ? of[part] ?? 1 : of
}

function simplest(parts) {
  for (const [component, value] of Object.entries(parts)) {
    if (typeof value === 'object' && PARTS.every((part) => value[part] === value.down)) parts[component] = value.down
  }
  const values = Object.values(parts)
  return values.every((value) => typeof value === 'number' && value === values[0]) ? values[0] : parts
}

function advanced(card, row) {
  const blocks = (component) => (props.blocked.includes(component) ? PARTS : [null])
  const dials = card.components.flatMap((component) => blocks(component).map((part) => ({ component, part })))
  const collect = (changed, value) => {
    const parts = {}
    for (const each of dials) {
      const now = each === changed ? value : partOf(row.strength, each.component, each.part)
      if (each.part === null) parts[each.component] = now
      else parts[each.component] = { ...parts[each.component], [each.part]: now }
    }
    row.set(simplest(parts))
  }
  const lines = dials.map((each) => {
    const words = each.part ? `${each.component} ${each.part}` : each.component
    each.dial = dial(`strength of ${card.name} in ${words}`, (value) => collect(each, value), true)
    return make('div', { class: 'part' }, make('span', { text: words.replaceAll('_', ' ') }), each.dial.node)
  })
  row.showParts = () => dials.forEach((each) => each.dial.show(partOf(row.strength, each.component, each.part)))
  row.showParts()
  return lines
}

function rowOf(card, before) {
  const row = { card, on: false, strength: before?.strength ?? 1, text: `${card.name} ${card.trigger}`.toLowerCase(), show() {}, showParts() {} }
  row.set = (strength) => {
    row.on = true // whoever moves a style wants to see it
    row.strength = strength
    row.show()
    send()
  }
  return row
}

function build(row) {
  const card = row.card
  const box = make('input', { type: 'checkbox', id: `on-${card.name}`, 'aria-label': card.name, onchange: () => { row.on = box.checked; row.show(); send() } })
  const main = dial(`strength of ${card.name}`, (value) => row.set(value))
  const fold = make('details', { class: 'parts' }, make('summary', { text: 'by part', 'aria-label': `strength of ${card.name} by part of the model` }))
  fold.addEventListener('toggle', () => {
    if (fold.open && fold.children.length === 1) fold.append(...advanced(card, row))
    rove(current)
  })
  const words = card.trigger && make('button', { type: 'button', class: 'words', title: 'put these words into the prompt', 'aria-label': `use the words “${card.trigger}”`, text: `+ ${card.trigger}`, onclick: () => trigger('words', { words: card.trigger }) })
  row.node = make('li', { class: 'picker-card' },
    make('label', { class: 'face', title: card.name }, thumbnail(card, 56)),
    make('div', { class: 'body' },
      make('div', { class: 'top' },
        make('label', { class: 'name' }, box, make('span', { text: card.name })),
        make('span', { class: 'size', title: 'entries changed, of the weights it adapts; size of the file', text: card.facts })),
      main.node,
      make('div', { class: 'below' }, words, fold),
      card.note && make('p', { class: 'note', text: card.note })))
  row.node.addEventListener('focusin', () => rove(row))
  row.node.querySelector('.face').addEventListener('click', () => box.click())
  row.show = () => {
    const mixed = typeof row.strength === 'object'
    box.checked = row.on
    row.node.classList.toggle('on', row.on)
    main.show(mixed ? partOf(row.strength, card.components[0], 'mid') : row.strength, mixed)
    row.showParts()
  }
  row.show()
  return row.node
}

// one card at a time is on the way of the Tab key, so that it need not cross them all; arrow keys lead to the others
let current = null
function rove(row) {
  current = row
  for (const node of cards.children) {
    const here = node === current?.node
    for (const part of node.querySelectorAll('input, button, summary')) part.tabIndex = here ? 0 : -1
  }
}

cards.addEventListener('keydown', (event) => {
  const boxes = [...cards.querySelectorAll('.name input')]
  const at = boxes.indexOf(event.target)
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: boxes.length - 1 }[event.key]
  if (at < 0 || !boxes[next]) return
  event.preventDefault()
  boxes[next].focus()
})

// those that are on come first where there are many, and stay where they are until the list is arranged again
function arrange() {
  const wanted = filter.value.trim().toLowerCase()
  const all = [...rows.values()]
  const found = all.filter((row) => row.text.includes(wanted) || row.on)
  const many = all.length > props.page
  const first = many ? [...found.filter((row) => row.on), ...found.filter((row) => !row.on)] : found
  const shown = first.slice(0, Math.max(limit, found.filter((row) => row.on).length))
  const focused = document.activeElement
  const label = cards.contains(focused) && focused.getAttribute('aria-label')
  cards.replaceChildren(...shown.map((row) => row.node ?? build(row)))
  if (label) cards.querySelector(`[aria-label="${CSS.escape(label)}"]`)?.focus() // of a new row, if the cards are new
  rove(shown.find((row) => row.card.name === current?.card.name) ?? shown.find((row) => row.on) ?? shown[0])
  const left = found.length - shown.length
  more.hidden = left === 0
  more.textContent = `Show ${Math.min(left, props.page)} of ${left} more`
  element.querySelector('.picker-lost').hidden = rows.size === 0 || found.some((row) => row.text.includes(wanted))
}

// a mix under the names that its styles have now: Undo and the browser's storage know earlier ones
function renamed(mix) {
  return Object.fromEntries(Object.entries(mix ?? {}).map(([name, strength]) => [window.shiraRenamed.get(name) ?? name, strength]))
}

function showMix() {
  const mix = renamed(props.value)
  for (const [name, row] of rows) {
    const strength = mix[name]
    row.on = strength !== undefined
    row.strength = strength ?? row.strength
    row.show()
  }
  recount()
}

function keepNames() {
  if (!Object.keys(props.value ?? {}).some((name) => window.shiraRenamed.has(name))) return
  window.shiraChanged = Date.now() // a new name is no change that Undo takes back
  send()
}

function showCards() {
  const before = new Map(rows)
  window.shiraRenamed = new Map(props.cards.flatMap((card) => card.was.map((name) => [name, card.name])))
  rows.clear()
  for (const card of props.cards) rows.set(card.name, rowOf(card, before.get(card.name) ?? before.get(card.was.at(-1))))
  filter.parentElement.classList.toggle('few', rows.size < 7)
  element.querySelector('.picker-none').hidden = rows.size > 0
  showMix()
  arrange()
  const gone = Object.keys(renamed(props.value)).filter((name) => !rows.has(name)) // deleted meanwhile
  keepNames()
  if (!gone.length) return
  send()
  trigger('gone', { names: gone })
}

filter.addEventListener('input', () => { limit = props.page; arrange() })
more.addEventListener('click', () => {
  const place = cards.children.length
  limit += props.page
  arrange()
  cards.children[place]?.querySelector('input').focus()
})
element.querySelector('.picker-clear').addEventListener('click', () => {
  for (const row of rows.values()) { row.on = false; row.show() }
  send()
})
watch('cards', showCards)
watch('value', () => {
  showMix()
  if (JSON.stringify(props.value) === JSON.stringify(sent)) return
  sent = props.value
  if (rows.size > props.page) arrange()
  preview()
  keepNames()
})
showCards()
