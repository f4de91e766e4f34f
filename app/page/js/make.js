// a node with attributes, text and listeners; names and words come from strangers, so no HTML is put together
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') node.textContent = value
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value)
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? '' : value)
  }
  node.append(...children.filter(Boolean))
  return node
}

function thumbnail(card, side) {
  return card.thumbnail
    ? make('img', { src: card.thumbnail, alt: '', loading: 'lazy', width: side, height: side })
    : make('span', { class: 'no-thumbnail', text: [...card.name][0].toUpperCase(), 'aria-hidden': 'true' })
}

