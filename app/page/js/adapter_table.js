// The library's table. props.rows come from the server: name, thumbnail, cells, note, twin, reason, origin, yours, lora.
const body = element.querySelector('tbody')
const filter = element.querySelector('.table-filter')
const all = element.querySelector('.table-all')
const remove = element.querySelector('.table-delete')
const labels = [...element.querySelectorAll('thead th')].slice(2, -1).map((head) => head.textContent)
let rows = [] // {row, node, box, text}

function action(name, text, send) {
  return make('button', { type: 'button', text, 'aria-label': `${text} ${name}`, onclick: send })
}

function rename(name, place) {
  const box = make('input', { value: name, maxlength: 60, 'aria-label': `New name of ${name}` })
  const form = make('form', {
    onsubmit: (event) => { event.preventDefault(); trigger('rename', { name, to: box.value }) },
    onkeydown: (event) => { if (event.key === 'Escape') form.replaceWith(place) },
  }, box, make('button', { text: 'Save' }))
  place.replaceWith(form)
  box.select()
}

function build(row) {
  const name = row.name
  const box = row.yours && make('input', { type: 'checkbox', 'aria-label': `Choose ${name}`, onchange: recount })
  const title = make('span', { class: 'name', text: name })
  const notes = [row.note, row.twin].filter(Boolean).map((text) => make('span', { class: 'note', text }))
  const cells = row.reason
    ? [make('td', { class: 'reason', colspan: 3, text: row.reason })]
    : row.cells.map((text, place) => make('td', { 'data-label': text && labels[place], text }))
  const node = make('tr', { class: row.reason && 'refused' },
    make('td', {}, box),
    make('th', { scope: 'row' }, make('span', { class: 'who' }, thumbnail(row, 36), make('span', {}, title, ...notes))),
    ...cells,
    make('td', { 'data-label': 'Origin', text: row.origin }),
    make('td', { class: 'actions' },
      action(name, 'Inspect', () => trigger('inspect', { name })),
      action(name, 'Download', () => trigger('download', { name })),
      row.lora && action(name, 'Convert', () => trigger('convert', { name })),
      row.yours && action(name, 'Rename', () => rename(name, title)),
      row.yours && action(name, 'Delete', () => trigger('delete', { names: [name] }))))
  return { row, node, box, text: [name, ...row.cells, row.reason, row.twin, row.origin].join(' ').toLowerCase() }
}

const found = () => rows.filter((each) => !each.node.hidden)
const chosen = () => found().filter((each) => each.box?.checked)

function recount() {
  const shown = found().length
  const count = chosen().length
  const which = shown < rows.length ? `${shown} of ${rows.length} adapters` : `${rows.length} adapters`
  element.querySelector('.table-count').textContent = count ? `${which}, ${count} chosen` : which
  remove.hidden = !count
  remove.textContent = `Delete ${count} chosen`
  const can = found().filter((each) => each.box)
  all.disabled = !can.length
  all.checked = can.length > 0 && can.length === count
}

function sift() {
  const wanted = filter.value.trim().toLowerCase()
  for (const each of rows) each.node.hidden = !each.text.includes(wanted)
  recount()
}

function show() {
  const marked = new Set(rows.filter((each) => each.box?.checked).map((each) => each.row.name))
  rows = props.rows.map(build)
  for (const each of rows) if (each.box) each.box.checked = marked.has(each.row.name)
  body.replaceChildren(...rows.map((each) => each.node))
  element.querySelector('.table-none').hidden = rows.length > 0
  sift()
}

filter.addEventListener('input', sift)
all.addEventListener('change', () => {
  for (const each of found()) if (each.box) each.box.checked = all.checked
  recount()
})
remove.addEventListener('click', () => trigger('delete', { names: chosen().map((each) => each.row.name) }))
watch('rows', show)
show()
