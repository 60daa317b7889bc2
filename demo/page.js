// What the page's own pieces do. One listener of each kind on the document: pieces come and go.
(() => {
  const within = (event, what) =>
    event.target instanceof Element ? event.target.closest(what) : null;

  // ---- the border between two pictures, and two players as one

  document.addEventListener("input", (event) => {
    const border = within(event, ".bc-slider input");
    if (border) border.parentElement.style.setProperty("--at", `${border.value}%`);
    const seek = within(event, ".bc-seek");
    if (seek) {
      const { all } = players(seek);
      const length = all[0].duration || 0;
      all.forEach((video) => { video.currentTime = (seek.value / 1000) * length; });
    }
  });

  const players = (inside) => {
    const figure = inside.closest(".bc-players");
    return {
      all: [...figure.querySelectorAll(".bc-screens video")],
      play: figure.querySelector(".bc-play"),
      seek: figure.querySelector(".bc-seek"),
    };
  };

  document.addEventListener("click", (event) => {
    const play = within(event, ".bc-play");
    if (play) {
      const { all } = players(play);
      const start = all[0].paused;
      all.forEach((video) => (start ? video.play() : video.pause()));
      all[1].currentTime = all[0].currentTime;
      play.textContent = start ? "Pause both" : "Play both";
    }
    const tile = within(event, "[data-item]");
    if (tile) {
      document.querySelectorAll(".bc-tile").forEach((each) => each.removeAttribute("aria-current"));
      tile.setAttribute("aria-current", "true");
      showAt("bc-opened");
    }
    const copy = within(event, "[data-copy]");
    if (copy) copyLink(copy);
    if (within(event, "#bc-go")) showAt("bc-stage");
    // The pair comes back on another tab.
    if (within(event, "[data-run]")) setTimeout(() => showAt("bc-stage"), 300);
  });

  // Only if its top is not to be seen.
  const showAt = (id) => {
    const piece = document.getElementById(id);
    const top = piece?.getBoundingClientRect().top ?? 0;
    if (top < 0 || top > 0.7 * innerHeight) piece.scrollIntoView({ behavior: "smooth" });
  };

  // Media events do not bubble; they are caught on their way down.
  document.addEventListener("timeupdate", (event) => {
    const video = within(event, ".bc-screens video");
    if (!video) return;
    const { all, seek } = players(video);
    const [first, second] = all;
    if (video !== first) return;
    if (first.duration && document.activeElement !== seek) {
      seek.value = (1000 * first.currentTime) / first.duration;
    }
    if (Math.abs(first.currentTime - second.currentTime) > 0.08) {
      second.currentTime = first.currentTime;
    }
  }, true);

  // ---- the link

  const copyLink = async (button) => {
    const words = button.textContent;
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      // Without https there is no clipboard; then the link is there to be copied by hand.
      window.prompt("The link to these settings:", location.href);
    }
    setTimeout(() => { button.textContent = words; }, 1500);
  };

  const follow = () => {
    const query = document.querySelector(".bc-result")?.dataset.query;
    if (query && location.search.slice(1) !== query) {
      const theme = new URLSearchParams(location.search).get("__theme");
      const more = theme ? `&__theme=${encodeURIComponent(theme)}` : "";
      if (location.search.slice(1) !== query + more) {
        history.replaceState(history.state, "", `?${query}${more}`);
      }
    }
  };

  // Gradio decides which tabs fit before the page has its widths; a resize has it look again.
  let isSettled = false;
  const settle = () => {
    if (isSettled || !document.querySelector("#bc-tabs button")) return;
    isSettled = true;
    setTimeout(() => dispatchEvent(new Event("resize")), 400);
  };

  // ---- numbers on hovering and on focus

  const tip = document.createElement("div");
  tip.id = "bc-tip";
  tip.setAttribute("role", "tooltip");
  const hide = () => { tip.hidden = true; };
  const show = (event) => {
    const mark = within(event, "[data-tip]");
    if (!mark) return hide();
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = mark.getBoundingClientRect();
    const wide = tip.offsetWidth;
    const x = Math.min(Math.max(8, box.x + box.width / 2 - wide / 2), innerWidth - wide - 8);
    const above = box.y - tip.offsetHeight - 8;
    tip.style.left = `${x}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  };
  document.addEventListener("pointerover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  const begin = () => {
    hide();
    document.body.append(tip);
    const changed = () => { follow(); settle(); };
    new MutationObserver(changed).observe(document.body, { childList: true, subtree: true });
  };
  if (document.body) begin();
  else document.addEventListener("DOMContentLoaded", begin);
})();
