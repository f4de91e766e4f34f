() => {
  // each tab has an address, like #train, so that it can be linked to and the back button leads to the tab before
  const tabs = () => [...document.querySelectorAll("#tabs [role=tab][data-tab-id]")];
  const addressed = () => tabs().find((tab) => `#${tab.dataset.tabId}` === location.hash) ?? tabs()[0];
  const open = () => addressed()?.ariaSelected === "false" && addressed().click();
  let opened = false;
  const follow = () => {
    if (!tabs().length) return;
    if (!opened) {
      opened = true;
      open();
      return;
    }
    const selected = tabs().find((tab) => tab.ariaSelected === "true");
    if (selected && selected !== addressed()) history.pushState(null, "", `#${selected.dataset.tabId}`);
  };
  window.addEventListener("popstate", open);
  new MutationObserver(follow).observe(document.body, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["aria-selected"],
  });
  follow();
}
