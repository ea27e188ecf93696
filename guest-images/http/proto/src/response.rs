//! Heads of responses.

use alloc::string::ToString;
use alloc::vec::Vec;

use crate::page::Page;
use crate::request::{Refusal, Request};

/// Appends the head of a response that carries `page`.
pub(crate) fn found(head: &mut Vec<u8>, request: &Request<'_>, page: Page) {
    status(head, "200 OK");
    entity(head, page);
    finish(head, request.keep_alive, request.is_old);
}

/// The page that says that there is no such page.
pub(crate) const NO_PAGE: Page = Page::Text("404 Not Found\n");

/// Appends the head of a response to a request for a page that does not exist.
pub(crate) fn not_found(head: &mut Vec<u8>, request: &Request<'_>) {
    status(head, "404 Not Found");
    entity(head, NO_PAGE);
    finish(head, request.keep_alive, request.is_old);
}

/// Appends a whole response to what is not served.
pub(crate) fn refused(head: &mut Vec<u8>, refusal: Refusal) {
    let text = refusal.to_string();
    status(head, &text);
    if refusal == Refusal::Method {
        head.extend_from_slice(b"Allow: GET, HEAD\r\n");
    }
    fields(head, "text/plain", text.len() as u64 + 1);
    finish(head, false, false);
    head.extend_from_slice(text.as_bytes());
    head.push(b'\n');
}

fn status(head: &mut Vec<u8>, text: &str) {
    head.extend_from_slice(b"HTTP/1.1 ");
    head.extend_from_slice(text.as_bytes());
    head.extend_from_slice(b"\r\n");
}

fn entity(head: &mut Vec<u8>, page: Page) {
    fields(head, page.media_type(), page.len());
}

fn fields(head: &mut Vec<u8>, media_type: &str, length: u64) {
    head.extend_from_slice(b"Content-Type: ");
    head.extend_from_slice(media_type.as_bytes());
    head.extend_from_slice(b"\r\nContent-Length: ");
    head.extend_from_slice(length.to_string().as_bytes());
    head.extend_from_slice(b"\r\n");
}

/// Says what becomes of the connection where the client would think otherwise.
fn finish(head: &mut Vec<u8>, keep_alive: bool, is_old: bool) {
    match (keep_alive, is_old) {
        (true, true) => head.extend_from_slice(b"Connection: keep-alive\r\n"),
        (false, _) => head.extend_from_slice(b"Connection: close\r\n"),
        (true, false) => {}
    }
    head.extend_from_slice(b"\r\n");
}
