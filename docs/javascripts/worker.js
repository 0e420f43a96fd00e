// The search of the site runs in a Web Worker. Browsers refuse workers on pages that are read from the disk (file://).
// There, and only there, this replaces `Worker` by a hidden frame that runs the worker's script and passes messages on.
// The theme would load such a replacement from a content delivery network; .ci/site_pages.py puts this file in its place.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      this.ready = false;
      document.body.appendChild(frame);
      const inner = frame.contentWindow;
      this.inner = inner;
      // What the worker's script expects to find in a worker.
      inner.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      const load = (address) =>
        new Promise((done) => {
          const script = inner.document.createElement("script");
          script.src = address;
          script.addEventListener("load", done);
          inner.document.body.appendChild(script);
        });
      inner.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve());
      load(new URL(url, document.baseURI).href).then(() => {
        this.ready = true;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
    }
    postMessage(data) {
      if (this.ready) this.inner.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {
      this.inner.frameElement.remove();
    }
  };
}
