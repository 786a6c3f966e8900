"use strict";
// The token view: one turn under one policy, every token with its round. The rest of the page works without scripts.
(() => {
  const { turns, names } = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const text = at("text"), tip = at("tip"), turnSelect = at("turn"), choice = at("choice");
  const known = new Set(["df", "e3", "none"]);
  // The selected policy, kept across turns; initially the one with the most drafter switches.
  let label = turns.flatMap((turn) => turn.policies).reduce((a, b) => (b.switches > a.switches ? b : a)).label;
  let tokens = []; // {element, round, title, proposer}; round is -1 for the token of the prefill
  let rounds = [];

  const make = (tag, className, content) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (content !== undefined) element.textContent = content;
    return element;
  };
  const named = (name) => names[name] ?? name;
  const style = (drafter) => (known.has(drafter) ? drafter : "other");
  const visible = (piece) => piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const quoted = (piece) => visible(piece).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
  const number = (value, unit) => (value === null || value === undefined ? "n/a" : `${+value.toFixed(3)}${unit}`);

  function describe(into, pairs) {
    into.replaceChildren(...pairs.flatMap(([term, value]) => [make("dt", "", term), make("dd", "", value)]));
  }

  function addToken(parent, piece, className, round, proposer) {
    const element = make("span", `token ${className}`);
    for (const part of piece.split(/(\n)/)) {
      if (part === "\n") element.append(make("span", "break", "⏎"), "\n");
      else element.append(part);
    }
    if (!piece) element.append(make("span", "break", "∅")); // a token without text, such as an end token
    element.tabIndex = -1;
    element.setAttribute("role", "option");
    element.setAttribute("aria-selected", "false");
    element.setAttribute("aria-label", `${visible(piece)}: ${proposer}`);
    element.dataset.token = tokens.length;
    tokens.push({ element, round, title: quoted(piece), proposer });
    parent.append(element);
  }

  function addRound(each, number) {
    const element = make("span", "round");
    if (number && rounds[number - 1].drafter !== each.drafter) {
      const mark = make("span", "switch", `⇄ ${named(each.drafter)}`);
      element.append(mark);
    }
    const drafted = each.drafts.length, accepted = each.tokens.slice(0, each.accepted);
    accepted.forEach((piece, i) =>
      addToken(element, piece, `draft ${style(each.drafter)}`, number, `${named(each.drafter)}, draft ${i + 1} of ${drafted}`));
    const rejected = each.drafts.slice(each.accepted);
    if (rejected.length) {
      element.append(make("span", "count", `✕${rejected.length}`), make("span", "drafts", rejected.map(visible).join("")));
    }
    each.tokens.slice(each.accepted).forEach((piece) => addToken(element, piece, "own", number, "the target (bonus token)"));
    text.append(element);
  }

  function drawTimeline() {
    const stretches = [];
    rounds.forEach((each, i) => {
      if (!stretches.length || stretches.at(-1).span !== each.span) stretches.push({ span: each.span, members: [] });
      stretches.at(-1).members.push(i);
    });
    const most = Math.max(1, ...rounds.map((each) => each.tokens.length));
    at("timeline").replaceChildren(...stretches.map(({ span, members }) => {
      const stretch = make("div", "stretch"), columns = make("div", "rounds");
      stretch.style.flex = members.length;
      stretch.style.maxWidth = `${Math.max(3, members.length) * 28}px`;
      for (const i of members) {
        const column = make("i", `fill ${style(rounds[i].drafter)}`);
        column.style.height = `${(100 * rounds[i].tokens.length) / most}%`;
        column.dataset.round = i;
        columns.append(column);
      }
      stretch.append(columns, make("span", "", named(span)));
      return stretch;
    }));
  }

  function draw() {
    const turn = turns[turnSelect.value];
    const view = turn.policies.find((each) => each.label === label) ?? turn.policies[0];
    hide();
    rounds = view.rounds;
    tokens = [];
    text.replaceChildren();
    choice.replaceChildren(choice.firstElementChild, ...turn.policies.map((each) => {
      const input = make("input");
      Object.assign(input, { type: "radio", name: "policy", value: each.label, checked: each === view });
      const wrapper = make("label");
      wrapper.append(input, each.label);
      return wrapper;
    }));
    document.querySelector(".asked summary").textContent = `answers a ${named(turn.asked.role === "tool" ? "tool_output" : turn.asked.role)}`;
    document.querySelector(".asked pre").textContent = turn.asked.text;
    if (view.first !== null) addToken(text, view.first, "own prefill", -1, "the target (prefill)");
    rounds.forEach(addRound);
    at("other").hidden = rounds.every((each) => known.has(each.drafter));
    if (tokens.length) tokens[0].element.tabIndex = 0;
    const committed = rounds.reduce((sum, each) => sum + each.tokens.length, 0);
    at("tiles").replaceChildren(...[
      ["tokens", `${view.tokens}`], ["rounds", `${rounds.length}`],
      ["AL", rounds.length ? (committed / rounds.length).toFixed(2) : "n/a"], ["switches", `${view.switches}`],
      ["TTFT", number(view.ttft_ms, " ms")], ["E2E", number(view.e2e_ms, " ms")],
    ].map(([term, value]) => {
      const tile = make("div");
      tile.append(make("dt", "", term), make("dd", "", value));
      return tile;
    }));
    drawTimeline();
    at("previous").disabled = +turnSelect.value === 0;
    at("next").disabled = +turnSelect.value === turns.length - 1;
  }

  function mark(round) {
    for (const element of document.querySelectorAll(".here")) element.classList.remove("here");
    if (round < 0) return;
    for (const token of tokens) if (token.round === round) token.element.classList.add("here");
    document.querySelector(`[data-round="${round}"]`)?.classList.add("here");
  }

  function show(index) {
    const { element, round, title, proposer } = tokens[index];
    const each = rounds[round];
    const list = make("dl");
    const lines = [["proposed by", proposer]];
    if (each) {
      const rejected = each.drafts.slice(each.accepted);
      lines.push(["round", `${round + 1} of ${rounds.length}, ${named(each.span)}`]);
      lines.push(["AL", `${each.tokens.length} (${each.accepted} of ${each.drafts.length} drafts + its own)`]);
      lines.push(["entropy", number(each.entropy, " nats")], ["router score", number(each.score, " AL")]);
      if (each.prior) lines.push(["prior", `${each.prior > 0 ? "+" : ""}${number(each.prior, " AL")}`]);
      if (rejected.length) lines.push(["rejected", rejected.map(visible).join("")]);
    } else {
      lines.push(["round", "none: the prefill gave it"], ["AL", "n/a"], ["entropy", "n/a"], ["router score", "n/a"]);
    }
    describe(list, lines);
    tip.replaceChildren(make("strong", "", title), list);
    tip.hidden = false;
    mark(round);
    element.setAttribute("aria-describedby", "tip");
    const box = element.getClientRects()[0], size = tip.getBoundingClientRect();
    const below = box.bottom + 8 + size.height < innerHeight;
    tip.style.left = `${scrollX + Math.max(8, Math.min(box.left, document.documentElement.clientWidth - size.width - 8))}px`;
    tip.style.top = `${scrollY + (below ? box.bottom + 8 : Math.max(8, box.top - size.height - 8))}px`;
  }

  function hide() {
    tip.hidden = true;
    mark(-1);
  }

  function focus(index) {
    const target = tokens[Math.max(0, Math.min(tokens.length - 1, index))];
    for (const token of tokens) token.element.tabIndex = -1;
    target.element.tabIndex = 0;
    target.element.focus();
  }

  const indexOf = (event) => {
    const element = event.target.closest("[data-token]");
    return element ? +element.dataset.token : null;
  };
  const firstOf = (round) => tokens.findIndex((token) => token.round === round);

  function onKey(event) {
    const index = indexOf(event);
    if (index === null) return;
    const round = tokens[index].round;
    const start = Math.max(0, firstOf(round));
    const moves = {
      ArrowRight: () => index + 1,
      ArrowLeft: () => index - 1,
      ArrowDown: () => (round + 1 < rounds.length ? firstOf(round + 1) : index),
      ArrowUp: () => (index > start ? start : Math.max(0, firstOf(round - 1))),
      Home: () => 0,
      End: () => tokens.length - 1,
    };
    if (event.key === "Escape") hide();
    else if (moves[event.key]) focus(moves[event.key]());
    else return;
    event.preventDefault();
  }

  text.addEventListener("mouseover", (event) => { const i = indexOf(event); if (i !== null) show(i); });
  text.addEventListener("mouseleave", hide);
  text.addEventListener("click", (event) => { const i = indexOf(event); if (i !== null) focus(i); });
  text.addEventListener("keydown", onKey);
  text.addEventListener("focusin", (event) => {
    const i = indexOf(event);
    if (i === null) return;
    tokens[i].element.setAttribute("aria-selected", "true");
    show(i);
  });
  text.addEventListener("focusout", (event) => {
    const i = indexOf(event);
    if (i !== null) tokens[i].element.setAttribute("aria-selected", "false");
    hide();
  });
  at("timeline").addEventListener("click", (event) => {
    const round = event.target.dataset.round;
    if (round !== undefined) focus(firstOf(+round));
  });
  choice.addEventListener("change", (event) => {
    label = event.target.value;
    draw();
    choice.querySelector(":checked").focus();
  });
  const step = (by) => { turnSelect.value = +turnSelect.value + by; draw(); };
  turnSelect.addEventListener("change", draw);
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  at("rejected").addEventListener("change", (event) => text.classList.toggle("with-rejected", event.target.checked));

  turnSelect.replaceChildren(...turns.map((turn, i) => Object.assign(make("option", "", turn.title), { value: i })));
  draw();
})();
